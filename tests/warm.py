"""Processes that begin with torch loaded: a client that stands for the process, and a server that forks it.

    python tests/warm.py train_gpt.py ARGUMENTS...       as python train_gpt.py ARGUMENTS...; also -m MODULE, -c CODE

Importing torch, and the compiler that torch.optim loads, takes 4 s of CPU; a run of the tests half a second. The client
hands its arguments, environment, folder, terminal and ignored signals to the server, which forks; passes on the signals
it receives; and ends as the fork does, by the same status or signal. A client that is killed takes its fork with it.
Where there is no server, or no pidfd, the client becomes the process itself.
"""

import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

SERVER = "WARM_SERVER"  # environment variable: where the server listens
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PRELOADED = ("train_gpt", "torch._dynamo", "torch.distributed.launcher.api")
STATUS = struct.Struct("i")


# What the tests call


def start_server() -> None:
    """Start the server for this process and all that it starts. It loads nothing before it is needed, and ends with
    this process."""
    if not hasattr(os, "pidfd_open"):
        return
    address = f"@warm-{secrets.token_hex(8)}"  # not a file: @ stands for the NUL of Linux's abstract names
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address.replace("@", "\0"))
        listener.listen(64)
        command = [sys.executable, __file__, "--serve", str(listener.fileno())]
        start_server.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])  # type: ignore[attr-defined]
    os.environ[SERVER] = address


# The client


def run(arguments: list[str]) -> int:
    """Have `python ARGUMENTS...` run by the server; returns its status, or ends by the signal that it ended by."""
    if SERVER not in os.environ:
        os.execv(sys.executable, [sys.executable, *arguments])
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    request = dict(
        arguments=arguments, environment=dict(os.environ), folder=str(Path.cwd()), ignored=ignored, parent=os.getppid()
    )  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[SERVER].replace("@", "\0"))
        for number in PASSED_ON:
            if number not in ignored:
                signal.signal(number, lambda number, _: server.send(bytes([number])))
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        answer = server.recv(STATUS.size)
    (status,) = STATUS.unpack(answer)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return int(status)


# The server


def serve(listener: socket.socket) -> None:
    """Fork a keeper for each client until stdin, the starter's, is closed. Returns in the forks alone, ready to run."""
    is_loaded = False
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        if not is_loaded:
            sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
            for module in PRELOADED:
                importlib.import_module(module)
            del sys.path[0], sys.modules["__mp_main__"]  # multiprocessing's other name for this script
            is_loaded = True
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(client)
            return
        client.close()


def keep(client: socket.socket) -> None:
    """Fork the client's process, which returns; stay behind to pass signals to it and its end to the client."""
    data, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
    pid = os.fork()
    if pid == 0:
        client.close()
        become(json.loads(data), files)
        return
    for file in files:
        os.close(file)
    os.setsid()  # not of the terminal's group: its Ctrl-C comes through the client
    end = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([client, end], [], [])
        if end in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            client.send(STATUS.pack(status))
            os._exit(0)
        number = client.recv(1)
        os.kill(pid, number[0] if number else signal.SIGKILL)
        if not number:
            os._exit(0)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Make this fork the process that was asked for, up to running its code."""
    os.setsid()
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        if name == "stderr":
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.getppid = lambda: request["parent"]
    for number in PASSED_ON:
        action = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else action)
    sys.argv = request["arguments"]


def run_code() -> None:
    """Run sys.argv as python would: a script, -m with a module, or -c with code."""
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        sys.path.insert(0, str(Path.cwd()))
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(code, vars(sys.modules["__main__"]))
    elif sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        del sys.path[0]  # the tests' folder
        serve(socket.socket(fileno=int(sys.argv[2])))
        run_code()
    else:
        sys.exit(run(sys.argv[1:]))

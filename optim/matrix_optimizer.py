"""MatrixOptimizer: what all optimizers of hidden matrices share, around one method that tells them apart.

For each matrix with gradient G (m rows are outputs, n columns inputs), momentum B, learning rate lr:

    B <- momentum * B + (1 - momentum) * G
    M  = momentum * B + (1 - momentum) * G       (nesterov; else M = B)
    U  = orthogonalize(M)                        (a subclass's; Muon: the polar factor of M)
    W <- (1 - lr * weight_decay) * W - lr * scale(m, n) * U

Momentum and scale "spectral" are Muon's (Keller Jordan et al., 2024), scale "match_rms_adamw" is from Liu et al.,
arXiv 2502.16982, which lets AdamW's learning rates be used.

A new update rule is a subclass with one method:

    class SignMuon(MatrixOptimizer):
        def orthogonalize(self, update, state, group):
            return update.sign() / update.size(-1) ** 0.5
"""

import copy
import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import backend
from optim.bank import Bank, State, layout
from optim.checks import OWN_STATE, check_kinds, check_parameters, fitted_state_dict, option_defaults, warn_of_stacks
from optim.gradient_check import GradientCheck
from optim.polar import check_polar_arguments
from optim.reductions import Reductions, when_ready

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "none": lambda m, n: 1.0,
}


class MatrixOptimizer(torch.optim.Optimizer):
    """Base class: momentum, batches of equal shape, an owner for each matrix among the ranks, weight decay, the update.

    Parameters have two or more dimensions; the last two are the matrix, leading ones are batch (stacked weights,
    experts). Options of a param group, with their defaults as arguments here:

    - `flatten`: each parameter is one matrix [size(0), rest], as convolution weights [out, in, kh, kw] are best taken.
      False keeps the last two dimensions, as does None (the default) with a warning for parameters of four or more;
      of three, stacks of matrices and one-dimensional convolutions cannot be told apart, so that nothing is said.
    - `row_blocks`: each matrix is this many equal blocks of rows that are orthogonalised apart (3 for a fused
      [3 D, D] of queries, keys and values, the number of heads or head groups for one block each).
    - `cautious`: weight decay only where it does not work against the update (Chen et al., arXiv 2510.12402).
    - `scale`: of the update, "spectral" sqrt(max(1, m / n)), "match_rms_adamw" 0.2 sqrt(max(m, n)), "none" 1.

    Momentum is float32 whatever the parameter's dtype; parameters of 16 bits follow a float32 master copy. With
    torch.distributed initialised, gradients are averaged over `process_group` (default: all ranks), each rank keeps
    state and computes updates for its share of the matrices alone, and `comm_dtype` (float32, or bfloat16 for half the
    traffic) is what travels. Then `step`, `state_dict`, copying and `add_param_group` after a step are collectives that
    all ranks have to call; a state dict is whole and fits any number of ranks. Gradients must be present on the same
    parameters everywhere; a parameter without one is skipped. Weights of 16 bits are changed through the optimizer or
    before its state is loaded, not behind its back. `kernels` is "auto" (Triton on CUDA), "triton" or "torch".

    Raises ValueError for wrong hyperparameters, for parameters that are not matrices (and what else optim/checks.py
    refuses), and for a state dict that does not fit, which then changes nothing. A gradient that is not finite raises
    FloatingPointError on all ranks before anything is touched. Looking makes a GPU wait at every step; with
    `defer_check` such a step changes nothing here all the same, and `raise_if_not_finite()` reports it when asked.
    """

    _banks: list[tuple[Bank, dict[str, Any]]]  # with the group of each; empty until they are needed

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = "spectral",
        polar_method: str = "polar_express",
        polar_steps: int | None = None,
        cautious: bool = False,
        row_blocks: int = 1,
        flatten: bool | None = None,
        kernels: str = "auto",
        comm_dtype: torch.dtype = torch.float32,
        defer_check: bool = False,
        process_group: dist.ProcessGroup | None = None,
        rule: dict[str, Any] | None = None,
    ) -> None:
        """`rule` holds a subclass's own options and their defaults, which become options of its param groups."""
        # where and how, not what: no part of the state
        self.kernels, self.comm_dtype, self.process_group = kernels, comm_dtype, process_group
        self.defer_check, self._hooked = defer_check, set[Tensor]()
        self._forget_banks()
        defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, scale=scale,
            polar_method=polar_method, polar_steps=polar_steps, cautious=cautious, row_blocks=row_blocks,
            flatten=flatten, **(rule or {}),
        )  # fmt: skip
        if comm_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{type(self).__name__}: comm_dtype = {comm_dtype} must be torch.float32 or torch.bfloat16"
            )
        super().__init__(params, defaults)

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """The direction to move in, for a batch of momenta `update` [B, m, n] float32; same shape, any dtype.

        `update` may be overwritten. `state` holds this batch's tensors of leading size B, to be changed or replaced; a
        rule adds its own under new names when they are missing, and meets zeros for matrices that it has not seen.
        """
        raise NotImplementedError

    # Param groups and the banks made from them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        warn_of_stacks(type(self).__name__, self._names(len(self.param_groups) - 1), self.param_groups[-1])
        if self._banks:  # made anew, with what they hold
            self._return_state()

    def _check_group(self, index: int) -> None:
        group, rule = self.param_groups[index], type(self).__name__
        check_kinds(rule, group)
        for key, low, high in (("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf)):
            if not low <= group[key] < high:
                raise ValueError(f"{rule}: {key} = {group[key]} must be at least {low} and below {high}")
        if group["scale"] not in SCALES:
            raise ValueError(f"{rule}: scale = {group['scale']!r} is unknown; choose one of {', '.join(SCALES)}")
        check_polar_arguments(group["polar_method"], group["polar_steps"])
        check_parameters(rule, self._names(index), group)
        for device in {p.device for p in group["params"]}:
            backend(self.kernels, device)

    def _names(self, index: int) -> list[str]:
        group = self.param_groups[index]
        return group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(group["params"]))]

    def plan_banks(self, rank: int, num_ranks: int) -> list[tuple[Bank, dict[str, Any]]]:
        """New banks of all param groups for one of several ranks, each with its group: matrices of one shape, dtype
        and device together, in order of first appearance."""
        result = []
        for index, group in enumerate(self.param_groups):
            kinds: dict[Any, list[int]] = defaultdict(list)
            for i, p in enumerate(group["params"]):
                kinds[layout(p, group["row_blocks"], group["flatten"])[1:], p.dtype, p.device].append(i)
            names = self._names(index)
            for places in kinds.values():
                bank = Bank(
                    [group["params"][i] for i in places], [names[i] for i in places], group["row_blocks"],
                    self.comm_dtype, self.process_group, rank, num_ranks, group["flatten"],
                )  # fmt: skip
                result.append((bank, group))
        return result

    def _make_banks(self) -> list[tuple[Bank, dict[str, Any]]]:
        """The banks in use; the first call moves the state there is (loaded or unpickled) into them."""
        if not self._banks:
            rank, num_ranks = 0, 1
            if dist.is_initialized():
                rank, num_ranks = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
            self._banks = self.plan_banks(rank, num_ranks)
            params = [p for group in self.param_groups for p in group["params"]]
            banks = [bank for bank, _ in self._banks]
            self._reductions = Reductions(banks, params)
            self._gradient_check = GradientCheck(banks)
            for bank in banks:
                bank.take_state(self.state)
            self._show_state()
        return self._banks

    def _forget_banks(self) -> None:
        self._banks = []
        self._reductions = Reductions([], [])
        self._gradient_check = GradientCheck([])

    def rule_state(self, m: int, n: int, group: dict[str, Any]) -> State:
        """What the rule keeps for one m x n matrix, [1, ...], as tensors without memory."""
        state, kernels, self.kernels = State(), self.kernels, "torch"  # the others do not run without memory
        try:
            self.orthogonalize(torch.empty(1, m, n, dtype=torch.float32, device="meta"), state, group)
        finally:
            self.kernels = kernels
        return state

    # State: in the banks while in use, whole in `self.state` on its way in and out

    def _show_state(self) -> None:
        """Let `self.state` show what the banks hold: with one process views of it, as users of torch expect; with more
        only that there is some, which utilities ask before they make state themselves."""
        if all(bank.num_ranks == 1 for bank, _ in self._banks):
            self.state = self._whole_state()
        else:
            self.state = defaultdict(dict, {p: {} for bank, _ in self._banks if bank.state for p in bank.params})

    def _whole_state(self) -> defaultdict[Tensor, Any]:
        if not self._banks:
            return self.state
        return defaultdict(dict, {p: state for bank, _ in self._banks for p, state in bank.whole_state() if state})

    def _return_state(self) -> None:
        self.state = self._whole_state()
        self._forget_banks()

    def state_dict(self) -> dict[str, Any]:
        """Whole and as one process would give it, for any number of ranks; all of them have to call it."""
        kept, self.state = self.state, self._whole_state()
        try:
            return super().state_dict()
        finally:
            self.state = kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state stays float32 where torch would cast it to the parameter's dtype, options that the
        saved groups lack stay as they are, and ValueError is raised for what does not fit, before anything changes."""
        if state_dict is None:  # torch would copy it before any hook
            raise ValueError(f"{type(self).__name__}: the state dict is None; give what state_dict() returned")
        taken: dict[str, Any] = {}  # what is loaded, after everyone's hooks have changed it

        def take(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            taken.update(fitted_state_dict(self, state_dict))
            return taken

        def keep_float32(optimizer: torch.optim.Optimizer) -> None:
            saved = [i for group in taken["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, p in zip(saved, params, strict=True):
                for name, value in taken["state"].get(i, {}).items():
                    self.state[p][name] = value.to(p.device, torch.float32, copy=True)

        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(keep_float32, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        how = {name: getattr(self, name) for name in ("kernels", "comm_dtype", "defer_check")}
        return {**super().__getstate__(), "state": self._whole_state(), **how}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the end of load_state_dict: the banks no longer hold the state
        self._forget_banks()
        self.__dict__.setdefault("process_group", None)  # which cannot be pickled: all ranks, for the unpickled
        self.__dict__.setdefault("_hooked", set())
        options = option_defaults(type(self))
        self.defaults = {**options, **self.defaults}  # of a pickle that is older than an option
        for group in self.param_groups:
            group.update({**options, **group})

    def __deepcopy__(self, memo: dict[int, Any]) -> "MatrixOptimizer":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group = self.process_group
        return twin

    # A step

    def reduce_in_backward(self) -> None:
        """Let the next backward pass start averaging each gradient over the ranks as soon as it is there.

        To be called on every rank before the last micro-batch's backward, which makes the gradients final: whatever
        changes them between that and the step (clipping, say) comes too late. Without ranks it does nothing.
        """
        if all(bank.num_ranks == 1 for bank, _ in self._make_banks()):
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._hooked:
                    self._hooked.add(p)
                    p.register_post_accumulate_grad_hook(when_ready(weakref.ref(self)))
        self._reductions.await_backward()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        banks = self._make_banks()
        gradients = self._reductions.finish()
        is_finite = self._gradient_check.look(gradients, self.defer_check)
        held, sent = sum(len(bank.state) for bank, _ in banks), []
        for bank, group in banks:  # while one bank's results travel, the next one's are computed
            gradient = gradients.pop(0)  # popped: each is freed once it is used
            if any(p.requires_grad if bank.num_ranks > 1 else p.grad is not None for p in bank.params):
                self._start_update(bank, gradient, group, is_finite)
                sent.append((bank, group))
        for bank, group in sent:
            self._finish_update(bank, group, is_finite)
        if sum(len(bank.state) for bank, _ in banks) != held:
            self._show_state()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._reductions.abandon()  # a step that is skipped, if any had started
        super().zero_grad(set_to_none)

    def raise_if_not_finite(self) -> None:
        """Under `defer_check`: what would have been raised since the last call. Waits for the device."""
        self._gradient_check.raise_if_any()

    def _start_update(self, bank: Bank, gradient: Tensor, group: dict[str, Any], is_finite: Tensor | None) -> None:
        """The update of this rank's matrices, on its way to the other ranks."""
        if "momentum_buffer" not in bank.state:
            bank.state["momentum_buffer"] = torch.zeros_like(gradient)
        slots = bank.active_slots()
        is_moving = bank.mask(slots)
        if is_finite is not None:
            is_moving = is_finite.expand(bank.num_own) if is_moving is None else is_moving & is_finite
        views = {name: value[: bank.num_own] for name, value in bank.state.items()}
        state = dict(views)
        direction = self._direction(state, gradient[: bank.num_own], group, is_moving)
        for name, value in state.items():
            if name not in views:
                bank.state[name] = value.new_zeros(bank.num_slots, *value.shape[1:])
            if value is not views.get(name):  # new, or put in place of the old
                bank.state[name][: bank.num_own] = value
        if bank.needs_master:
            master, updates = bank.own_masters(), self._scaled(direction, bank, group, is_finite)
            self._move([master[slot] for slot in slots], [updates[slot] for slot in slots], group, is_finite)
            direction = master[: bank.num_own].to(bank.dtype)
        bank.start_gather(direction)

    def _direction(self, state: State, gradient: Tensor, group: dict[str, Any], is_moving: Tensor | None) -> Tensor:
        """Where to move, [B, m, n]; `state` follows where `is_moving` [B], and stays as it is elsewhere."""
        weight, before = 1 - group["momentum"], State()
        if is_moving is not None:
            gradient = torch.where(by_matrix(is_moving, gradient), gradient, 0)
            weight = weight * by_matrix(is_moving, gradient).float()
            before = {name: value.clone() for name, value in state.items() if name not in OWN_STATE}
        momentum_buffer = state["momentum_buffer"].lerp_(gradient, weight)
        update = gradient.lerp_(momentum_buffer, group["momentum"]) if group["nesterov"] else momentum_buffer.clone()
        with torch.autocast(update.device.type, enabled=False):  # the caller's would recast the products
            direction = self.orthogonalize(update, state, group)
        if is_moving is not None:
            for name in state.keys() - OWN_STATE:
                value = state[name]
                unmoved = before.get(name, torch.zeros_like(value))
                value.copy_(torch.where(by_matrix(is_moving, value), value, unmoved))
        return direction

    def _finish_update(self, bank: Bank, group: dict[str, Any], is_finite: Tensor | None) -> None:
        results = bank.gathered()
        if not bank.needs_master:
            results = self._scaled(results, bank, group, is_finite)
        weights, updates = bank.active_pairs(results)
        if not weights:
            return
        if bank.needs_master:
            torch._foreach_copy_(weights, updates)
        else:
            self._move(weights, updates, group, is_finite)

    def _scaled(self, direction: Tensor, bank: Bank, group: dict[str, Any], is_finite: Tensor | None) -> Tensor:
        """lr * scale * direction, float32; zero after a bad gradient."""
        return direction.float() * (rate(group, is_finite) * SCALES[group["scale"]](bank.m, bank.n))

    def _move(
        self, weights: list[Tensor], updates: list[Tensor], group: dict[str, Any], is_finite: Tensor | None
    ) -> None:
        """weight <- weight - lr * weight_decay * weight - update, in place."""
        if group["weight_decay"] and weights:
            decay = rate(group, is_finite) * group["weight_decay"]
            if group["cautious"]:
                decays = torch._foreach_mul(weights, updates)
                torch._foreach_sign_(decays)
                torch._foreach_clamp_min_(decays, 0)  # 1 where decay and update both shrink the weight, else 0
                torch._foreach_mul_(decays, weights)
                torch._foreach_mul_(decays, decay)
                torch._foreach_sub_(weights, decays)
            else:
                torch._foreach_mul_(weights, 1 - decay)
        if weights:
            torch._foreach_sub_(weights, updates)


def rate(group: dict[str, Any], is_finite: Tensor | None) -> Any:
    """The learning rate, or zero after a bad gradient, decided on the device."""
    return group["lr"] if is_finite is None else group["lr"] * is_finite.float()


def by_matrix(flags: Tensor, value: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to go with `value` [B, ...]."""
    return flags.view(-1, *[1] * (value.ndim - 1))

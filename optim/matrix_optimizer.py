"""MatrixOptimizer: what all optimizers of hidden matrices share, around one method that tells them apart.

For each matrix with gradient G (m rows are outputs, n columns inputs), momentum B, learning rate lr:

    B <- momentum * B + (1 - momentum) * G
    M  = momentum * B + (1 - momentum) * G       (nesterov; else M = B)
    U  = orthogonalize(M)                        (a subclass's; Muon: the polar factor of M)
    W <- (1 - lr * weight_decay) * W - lr * scale(m, n) * U

Momentum and scale "spectral", sqrt(max(1, m / n)), are Muon's (Keller Jordan et al., 2024); "match_rms_adamw",
0.2 sqrt(max(m, n)), lets AdamW's learning rates be used (Liu et al., arXiv 2502.16982); "aspect" is sqrt(m / n),
"none" 1.

A new update rule is a subclass with one method:

    class SignMuon(MatrixOptimizer):
        def orthogonalize(self, update, state, group):
            return update.sign() / update.size(-1) ** 0.5

or with `direction` in its place, where it needs gradients or weights themselves. What any rule may do to the weights
besides (decay, a fixed norm, a floor under the update) is in apply_update.py.
"""

import copy
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from optim.apply_update import SCALES, WEIGHT_OPTIONS, apply_in_one_pass, apply_update, scaled
from optim.bank import Bank, State, by_matrix, layout
from optim.batch import MatrixBatch
from optim.checks import OWN_STATE, check_capture, check_group, fitted_state_dict, warn_of_stacks
from optim.gradient_check import GradientCheck
from optim.gradients import Gradients
from optim.options import Option, check_names, signature_with
from optim.polar import METHODS, dtype_of_unit_rows, fast_half_dtype, polar
from optim.reductions import Reductions
from optim.sharded_bank import ShardedBank
from optim.shards import is_dtensor, shard_group
from optim.unit_rows import UnitRows, is_given_unit_rows


class MatrixOptimizer(torch.optim.Optimizer):
    """Base class: momentum, batches of equal shape, an owner for each matrix among the ranks, weight decay, the update.

    `options` are the options of a param group, each a keyword argument for all groups too; a subclass's are added to
    those of its bases, or take their place. Parameters have two or more dimensions; the last two are the matrix,
    leading ones are batch (stacked weights, experts). With `flatten` each parameter is one matrix, as convolution
    weights [out, in, kh, kw] are best taken; None, the default, is False with a warning for parameters of four
    dimensions or more. `row_blocks` is 3 for a fused [3 D, D] of queries, keys and values, or the number of heads.

    Momentum is float32 whatever the parameter's dtype; parameters of 16 bits follow a float32 master copy. With
    torch.distributed initialised, gradients are averaged over `process_group` (default: all ranks), each rank keeps
    state and computes updates for its share of the matrices alone, and `comm_dtype` (float32, or bfloat16 for half the
    traffic) is what travels. Then `step`, `state_dict`, copying and `add_param_group` after a step are collectives that
    all ranks have to call; a state dict is whole and fits any number of ranks. Gradients must be present on the same
    parameters everywhere; a parameter without one is skipped. Weights of 16 bits are changed through the optimizer or
    before its state is loaded, not behind its back. `kernels` is "auto" (Triton on CUDA), "triton" or "torch".

    Raises ValueError for wrong hyperparameters, for parameters that are not matrices (and what else optim/checks.py
    refuses), and for a state dict that does not fit, which then changes nothing. A gradient that is not finite raises
    FloatingPointError on all ranks before anything is touched. The check makes a GPU wait at every step; with
    `defer_check` such a step changes nothing here all the same, and `raise_if_not_finite()` reports it when asked.

    With `defer_check` and a tensor for `lr` a CUDA graph can capture `step`, see docs/optimizers.md; RuntimeError for
    what would be replayed wrongly.
    """

    options: ClassVar[dict[str, Option]] = {
        "lr": Option(0.02, "learning rate", (">= 0",)),
        "momentum": Option(0.95, "share of the momentum that a step keeps", (">= 0", "< 1")),
        "nesterov": Option(True, "orthogonalise what momentum will be after one more step with this gradient"),
        "weight_decay": Option(0.0, "decoupled: a step multiplies weights by 1 - lr * this", (">= 0",)),
        "scale": Option("spectral", "of the update: spectral, match_rms_adamw, aspect or none", choices=tuple(SCALES)),
        "polar_method": Option("polar_express", "how polar factors are computed, see optim/polar.py", choices=METHODS),
        "polar_steps": Option(None, "Newton-Schulz steps; None: the method's own number", (">= 1",), kind=int),
        "cautious": Option(False, "decay only where it does not work against the update (arXiv 2510.12402)"),
        **WEIGHT_OPTIONS,
        "row_blocks": Option(1, "equal blocks of a matrix's rows, each orthogonalised by itself", (">= 1",)),
        "flatten": Option(None, "each parameter is one matrix [size(0), rest]", kind=bool),
    }
    is_scale_free: ClassVar[bool] = True  # a constant factor on all gradients changes nothing
    _declared: ClassVar[dict[str, Option]] = options  # the class's own part of `options`
    __signature__: ClassVar[inspect.Signature]
    _banks: list[tuple[Bank, dict[str, Any]]]  # with the group of each; empty until they are needed
    # From finish_reduction to step: the mean gradients of the banks, and the p.grad that they are made of
    _reduced: tuple[list[Gradients], list[Tensor | None]] | None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls._declared = vars(cls).get("options", {})
        for name, option in cls._declared.items():
            if not isinstance(option, Option):
                raise TypeError(f"{cls.__name__}: the option {name} is {option!r}; write Option({option!r}, 'meaning')")
        cls.options = {}
        for base in reversed(cls.__mro__):
            cls.options.update(vars(base).get("_declared", {}))
        cls.__signature__ = signature_with(cls.options, cls.__init__)

    def __init__(
        self,
        params: Any,
        lr: Any = ...,
        *,
        kernels: str = "auto",
        comm_dtype: torch.dtype = torch.float32,
        defer_check: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        """`options` are those that the class declares; TypeError for others."""
        # where and how, not what: no part of the state
        self.kernels, self.comm_dtype, self.process_group = kernels, comm_dtype, process_group
        self.defer_check, self._hooked = defer_check, set[Tensor]()
        self._forget_banks()
        who = type(self).__name__
        if comm_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{who}: comm_dtype = {comm_dtype} must be torch.float32 or torch.bfloat16")
        check_names(who, options, self.options)
        given = options if lr is ... else {"lr": lr, **options}
        super().__init__(params, {name: option.default for name, option in self.options.items()} | given)

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        """The direction to move in, for a batch of momenta `update` [B, m, n] float32; same shape, any dtype.

        `update` may be overwritten. `state` holds this batch's tensors of leading size B, to be changed or replaced; a
        rule adds its own under new names when they are missing, and meets zeros for matrices that it has not seen.
        """
        raise NotImplementedError

    def direction(self, batch: MatrixBatch) -> Tensor:
        """The direction to move in, [B, m, n] of any dtype: what `orthogonalize` makes of the momentum, unless a rule
        that needs more than momentum says otherwise."""
        orthogonalize: Callable[..., Tensor] = self.orthogonalize
        is_polar_ours = type(self).polar is MatrixOptimizer.polar  # another may want more than UnitRows
        if is_polar_ours and is_given_unit_rows(orthogonalize):
            how = self.polar_arguments(batch.state["momentum_buffer"], batch.group)
            if (dtype := dtype_of_unit_rows(how["method"], how["steps"], how["dtype"], batch.device)) is not None:
                return orthogonalize(batch.momentum_rows(dtype), batch.state, batch.group)
        return orthogonalize(batch.momentum(), batch.state, batch.group)

    def polar(self, update: Tensor | UnitRows, group: dict[str, Any]) -> Tensor:
        """The polar factor of `update`, as the group's options say; a helper for `orthogonalize`."""
        return polar(update, **self.polar_arguments(update, group))

    def polar_arguments(self, update: Tensor | UnitRows, group: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `polar` and of functions that take the same."""
        dtype = fast_half_dtype(update.device.type)
        return dict(method=group["polar_method"], steps=group["polar_steps"], dtype=dtype, kernels=self.kernels)

    def owners(self) -> dist.ProcessGroup | None:
        """The ranks that share the work: those with the parameters' shards, or `process_group`; None: all ranks."""
        p = self._any_param()
        return shard_group(p) if is_dtensor(p) else self.process_group

    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks whose gradients are averaged: the same, and for shards that have copies all ranks."""
        p = self._any_param()
        return shard_group(p) if is_dtensor(p) and p.device_mesh.ndim == 1 else self.process_group

    def _any_param(self) -> Any:
        return next((p for group in self.param_groups for p in group["params"]), None)

    # Param groups and the banks made from them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            check_group(self, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        warn_of_stacks(type(self).__name__, self._names(len(self.param_groups) - 1), self.param_groups[-1])
        if self._banks:  # made anew, with what they hold
            self._return_state()

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
                bank = (ShardedBank if is_dtensor(group["params"][places[0]]) else Bank)(
                    [group["params"][i] for i in places], [names[i] for i in places], group["row_blocks"],
                    self.comm_dtype, self.owners(), rank, num_ranks, group["flatten"],
                )  # fmt: skip
                result.append((bank, group))
        return result

    def _make_banks(self) -> list[tuple[Bank, dict[str, Any]]]:
        """The banks in use; the first call moves the state there is (loaded or unpickled) into them."""
        if not self._banks:
            rank, num_ranks = 0, 1
            if dist.is_initialized():
                rank, num_ranks = dist.get_rank(self.owners()), dist.get_world_size(self.owners())
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
        self._banks, self._reduced = [], None
        self._reductions = Reductions([], [])
        self._gradient_check = GradientCheck([])

    def rule_state(self, m: int, n: int, group: dict[str, Any]) -> State:
        """What the rule keeps for one m x n matrix, [1, ...], as tensors without memory."""
        empty = torch.empty(1, m, n, dtype=torch.float32, device="meta")
        state, kernels, self.kernels = State(momentum_buffer=empty), self.kernels, "torch"  # others do not run without
        try:
            gradients = Gradients((1, m, n), empty.device, whole=empty.clone())
            self.direction(MatrixBatch(gradients, state, group, empty.clone))
        finally:
            self.kernels = kernels
        del state["momentum_buffer"]
        return state

    # State: in the banks while in use, whole in `self.state` on its way in and out

    def _show_state(self) -> None:
        """Let `self.state` show what the banks hold: with one process views of it, as users of torch expect; with more
        names and shapes without memory, as utilities ask for names before they make state themselves or load some."""
        if all(bank.num_ranks == 1 for bank, _ in self._banks):
            self.state = self._whole_state()
        else:
            self.state = defaultdict(dict, {p: state for bank, _ in self._banks for p, state in bank.shapes() if state})

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
            return {**taken, "state": {}}  # the tensors follow below, in float32

        def keep_float32(optimizer: torch.optim.Optimizer) -> None:
            saved = [i for group in taken["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, p in zip(saved, params, strict=True):
                device = torch.device("cpu") if is_dtensor(p) else p.device  # there may be no room for it whole
                for name, value in taken["state"].get(i, {}).items():
                    self.state[p][name] = value.to(device, torch.float32, copy=True)

        with (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(keep_float32, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        how = {name: getattr(self, name) for name in ("kernels", "comm_dtype", "defer_check")}
        return {**super().__getstate__(), "state": self._whole_state(), **how}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the end of load_state_dict: the banks no longer hold the state
        self._forget_banks()
        self.__dict__.setdefault("process_group", None)  # which cannot be pickled: all ranks, for the unpickled
        self.__dict__.setdefault("_hooked", set())
        options = {name: option.default for name, option in self.options.items()}
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

    def start_reduction(self) -> None:
        """Let the next backward pass start averaging each gradient over the ranks as soon as it is there.

        To be called on every rank before the last micro-batch's backward, which makes the gradients final: whatever
        changes p.grad between that and the step comes too late. Without ranks it does nothing.
        """
        self._reduced = None
        if all(bank.num_ranks == 1 or bank.is_sharded for bank, _ in self._make_banks()):
            return
        reference = weakref.ref(self)  # a parameter does not keep its optimizers alive

        def tell(p: Tensor) -> None:
            if (optimizer := reference()) is not None:
                optimizer._reductions.ready(p)

        for p in (p for group in self.param_groups for p in group["params"]):
            if p.requires_grad and p not in self._hooked:
                self._hooked.add(p)
                p.register_post_accumulate_grad_hook(tell)
        self._reductions.await_backward()

    @torch.no_grad()
    def finish_reduction(self) -> list[Tensor]:
        """The mean gradients over the ranks, [P, m, n] float32 of this rank's matrices for each bank (zeros where there
        is none), which the next step uses: changes of them count, later ones of p.grad do not."""
        return [own.whole for own in self.mean_gradients()]

    @torch.no_grad()
    def mean_gradients(self) -> list[Gradients]:
        """The same without copies: gradients that nobody has to send stay where they are until somebody asks for the
        `whole` of a bank."""
        self._make_banks()
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if self._reduced is None or any(grad is not old for grad, old in zip(grads, self._reduced[1], strict=True)):
            self._reduced = self._reductions.finish(), grads
        return self._reduced[0]

    # A traced step would lose the banks that it makes. (torch.compiler.disable imports Dynamo at once, for seconds.)
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                self._reduced = None
                loss = closure()
        check_capture(self)
        gradients, self._reduced = self.mean_gradients(), None
        banks = self._banks
        is_finite = self._gradient_check.check(gradients, self.defer_check, self.kernels)
        held, sent = sum(len(bank.state) for bank, _ in banks), []
        for bank, group in banks:  # while one bank's results travel, the next one's are computed
            own = gradients.pop(0)  # popped: each is freed once it is used
            if any(p.requires_grad if bank.num_ranks > 1 else p.grad is not None for p in bank.params):
                self._start_update(bank, own, group, is_finite)
                sent.append((bank, group))
        for bank, group in sent:
            self._finish_update(bank, group, is_finite)
        if sum(len(bank.state) for bank, _ in banks) != held:
            self._show_state()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._reduced = None  # of a step that is skipped, as are reductions that have started
        self._reductions.abandon()
        super().zero_grad(set_to_none)

    def raise_if_not_finite(self) -> None:
        """Under `defer_check`: what would have been raised since the last call. Waits for the device."""
        self._gradient_check.raise_if_any()

    def _start_update(self, bank: Bank, own: Gradients, group: dict[str, Any], is_finite: Tensor | None) -> None:
        """The update of this rank's matrices, on its way to the other ranks."""
        if "momentum_buffer" not in bank.state:
            bank.state["momentum_buffer"] = torch.zeros(own.shape, dtype=torch.float32, device=bank.device)
        slots = bank.active_slots()
        active = bank.mask(slots)
        if is_finite is not None:
            active = is_finite.expand(bank.num_own) if active is None else active & is_finite
        views = {name: value[: bank.num_own] for name, value in bank.state.items()}
        state = dict(views)
        batch = MatrixBatch(own.first(bank.num_own), state, group, bank.own_weights, active, self.kernels)
        direction = self._direction(batch)
        for name, value in state.items():
            if name not in views:
                bank.state[name] = value.new_zeros(bank.num_slots, *value.shape[1:])
            if value is not views.get(name):  # new, or put in place of the old
                bank.state[name][: bank.num_own] = value
        is_moved = bank.is_moved_by_owner(group)
        if is_moved:
            exact = torch.promote_types(bank.dtype, torch.float32)
            weights = bank.own_masters() if bank.needs_master else bank.own_weights(exact)
            updates = scaled(direction, bank.m, bank.n, group, is_finite)
            apply_update([weights[slot] for slot in slots], [updates[slot] for slot in slots], group, is_finite)
            direction = weights[: bank.num_own].to(bank.dtype)
            bank.has_moved = bank.has_moved or bool(group["lr"])
        bank.start_gather(direction, is_exact=is_moved)

    def _direction(self, batch: MatrixBatch) -> Tensor:
        """The direction to move in, [B, m, n]; the batch's state changes for the matrices alone that move."""
        state, active, before = batch.state, batch.active, State()
        if active is not None:
            before = {name: value.clone() for name, value in state.items() if name not in OWN_STATE}
        with torch.autocast(batch.device.type, enabled=False):  # the caller's would recast the products
            direction = self.direction(batch)
        if direction.shape != batch.shape:  # a transposed one would be read in the wrong order
            raise ValueError(
                f"{type(self).__name__}: the update of matrices {batch.shape} has shape {tuple(direction.shape)}; "
                "return one of the same shape"
            )
        if active is not None:
            for name in state.keys() - OWN_STATE:
                value = state[name]
                kept = before.get(name, torch.zeros_like(value))
                value.copy_(torch.where(by_matrix(active, value), value, kept))
        return direction

    def _finish_update(self, bank: Bank, group: dict[str, Any], is_finite: Tensor | None) -> None:
        results, is_moved = bank.gathered(), bank.is_moved_by_owner(group)
        if not is_moved:
            if apply_in_one_pass(bank, results, group, is_finite, self.kernels):
                return
            # A wide update may be a transposed view, which weights would be slow to take in
            results = scaled(results.contiguous(), bank.m, bank.n, group, is_finite)
        weights, updates = bank.active_pairs(results)
        if not weights:
            return
        if is_moved:
            torch._foreach_copy_(weights, updates)
        else:
            apply_update(weights, updates, group, is_finite)

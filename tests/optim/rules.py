"""All update rules, for tests of what every one of them promises: optim.RULES by name, and variants that compute
something else. A new line of optim.RULES is in these tests by itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optim
from optim import AdamH, Aurora, MatrixOptimizer, MuonEq, NorMuon, RiemannianAurora

Make = Callable[..., MatrixOptimizer]
RULES: dict[str, Make] = {
    **optim.RULES,
    "adamh": partial(AdamH, hyperball=False),  # which takes no zeros and no decay
    "riemannian_aurora": partial(RiemannianAurora, outer_steps=1, cg_steps=5),  # its default takes its time
    "aurora, paper": partial(Aurora, variant="paper"),
    # Polar Express's ripple makes memory amplify rounding, in matrices of a few columns alone
    "aurora, warm": partial(Aurora, variant="warm", polar_method="simple_quintic"),
    "normuon, long": partial(NorMuon, axis="long"),
    "muon_eq, both": partial(MuonEq, axis="both"),
}


def is_scale_free(make: Make) -> bool:
    """Whether the rule says that a constant factor on all gradients changes nothing."""
    rule: Any = make.func if isinstance(make, partial) else make
    return bool(rule.is_scale_free)

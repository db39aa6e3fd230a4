"""The table of row norms against hand-made runs."""

from docs.generate import row_norms


def test_a_row_is_the_mean_over_the_runs_of_a_cell() -> None:
    def run(seed: int, loss: float, steps: int | None, tall: list[float]) -> dict[str, object]:
        cell = {"matrix_optimizer": "muon", "matrix_lr": "0.01"}
        return dict(cell=cell, seed=seed, val_loss=loss, steps_to_target=steps, spreads=dict(tall=tall, wide=[0.5]))

    (row,) = row_norms([run(0, 1.0, 100, [0.1, 0.3]), run(1, 1.2, None, [0.4])])
    assert list(row.values()) == [
        "matrix_optimizer=muon, matrix_lr=0.01",
        "1.1000 ± 0.1414",
        "100",
        "0.300 ± 0.141",
        "0.500 ± 0.000",
    ]

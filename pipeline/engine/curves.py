"""The curves of a training, and their ends for metrics.json."""

from pathlib import Path
from typing import Any

from pipeline.diva import step

CURVES = ("loss", "lr", "gradient_norm", "parameter_norm", "update_norm", "validation_loss")


def plot(curves: Path, record: step.Record) -> None:
    """Add a step to the curves, a file each, which `dvc plots` reads; they are there to look at while it runs."""
    for curve, value in {**record.terms, **{curve: getattr(record, curve) for curve in CURVES}}.items():
        if value is not None:
            path = curves / "plots/metrics" / record.phase / f"{curve}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{record.step}\t{value}\n" if file.tell() else f"step\t{curve}\n{record.step}\t{value}\n")


def ends(records: list[step.Record]) -> dict[str, Any]:
    """The tower's losses at both ends of training: means over a tenth of its steps, and the validation loss."""
    tower = [record for record in records if record.phase == "tower"]
    window = max(1, len(tower) // 10)
    validation = [record.validation_loss for record in tower if record.validation_loss is not None]
    return {
        "loss_first_tenth": round(sum(record.loss for record in tower[:window]) / window, 5),
        "loss_last_tenth": round(sum(record.loss for record in tower[-window:]) / window, 5),
        "terms_last_tenth": {
            name: round(sum(record.terms[name] for record in tower[-window:]) / window, 5) for name in tower[0].terms
        },
    } | ({
        "validation_loss_first": round(validation[0], 5),
        "validation_loss_last": round(validation[-1], 5),
    } if validation else {})  # fmt: skip

"""The checkpoint of a training, from which a killed run goes on to the same bytes."""

import dataclasses

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file

from pipeline.diva import step
from pipeline.diva.feedback import Feedback
from pipeline.diva.schedule import Phase
from pipeline.engine import hosts
from pipeline.engine.scratch import Scratch

Undecodable = dict[str, set[str]]  # keys of images by shard
Projection = dict[str, torch.Tensor]


@dataclasses.dataclass
class RunState:
    """How far a run has come. undecodable: images that were skipped. start: the projector at the start of the tower
    phase. optimizer: its state, with the name of the phase that the checkpoint was written in."""

    records: list[step.Record]
    undecodable: Undecodable
    start: Projection | None = None
    optimizer: tuple[str, dict[str, torch.Tensor]] | None = None


class Checkpoint(Scratch):
    """The scratch file of a training."""

    def resume(self, feedback: Feedback) -> RunState | None:
        """Restore what was saved and return how far it had come; None if there is no checkpoint of this run."""
        if not (state := self.state()):
            return None
        records = [step.Record(**record) for record in state["records"]]
        own = load_file(self.path) if self.path and self.processes.is_main_process else None
        last, tensors = records[-1], hosts.to_all(self.processes, own)
        step.restore(feedback, tensors)
        if self.processes.is_main_process:
            print(f"going on after step {last.step} of phase '{last.phase}', from {self.path}", flush=True)
        start = None
        if last.phase == "tower":
            start = {name: tensors[f"start.{name}"] for name in feedback.projection.state_dict()}
        undecodable = {shard: set(keys) for shard, keys in state["undecodable"].items()}
        return RunState(records, undecodable, start, (last.phase, tensors))

    def save(self, feedback: Feedback, phase: Phase, so_far: RunState) -> None:
        """Write a checkpoint; all processes call it."""
        passed_over = of_all(so_far.undecodable)
        tensors = step.tensors_of(feedback, phase)
        tensors |= {f"start.{name}": tensor for name, tensor in (so_far.start or {}).items()}
        records = [dataclasses.asdict(record) for record in so_far.records]
        undecodable = {shard: sorted(keys) for shard, keys in sorted(passed_over.items())}
        self.write(tensors, records=records, undecodable=undecodable)


def of_all(undecodable: Undecodable) -> Undecodable:
    """The undecodable images of all processes together."""
    together: Undecodable = {}
    for shard, keys in gather_object([(shard, set(keys)) for shard, keys in list(undecodable.items())]):
        together.setdefault(shard, set()).update(keys)
    return together

"""`zamba2 export`: a checkpoint of a run as a Hugging Face checkpoint."""

import dataclasses
from typing import Annotated

import tyro
from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a checkpoint of a training run as a Hugging Face checkpoint.

    It holds the weights, the config and the tokenizer; `transformers` and `load_hf` read it. The run may be going on.
    """

    directory: Annotated[str, tyro.conf.arg(name="run", metavar="PATH")]
    """Directory of the run, local or the URL of one in an object store."""
    output: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Directory to write, new or empty, local or in an object store."""
    step: int | None = None
    """Which checkpoint, by its step; the last one by default."""

    def run(self) -> int:
        """Writes the checkpoint and returns 0.

        Raises:
            ValueError: the run is not valid.
            OSError: there is no such run or checkpoint, or the directory cannot be written.
        """
        from zamba2_jax.train.export import export

        step = export(self.directory, self.output, self.step)
        Console(highlight=False).print(f"Step {step} is written to {self.output}", markup=False, soft_wrap=True)
        return 0

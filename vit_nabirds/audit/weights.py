"""What a run starts from."""

from vit_nabirds.audit.findings import Findings
from vit_nabirds.training.run import Run


def of_weights(run: Run) -> Findings:
    """Which arrays are loaded from where, whether positions are resized, and what is new."""
    if run.saved_steps:
        kept = ", with the weights under its low-rank changes" if run.config.lora.rank else ""
        return Findings([f"weights      of this run's checkpoint of step {run.start:,}{kept}"])
    if run.pretrained is None:
        return Findings(["weights      all new, drawn at random (config.model.pretrained is empty)"])
    account = run.pretrained.account(run.model.architecture, run.metadata.species)
    first, *rest = account.removeprefix("weights of ").splitlines()
    return Findings([f"weights      {first}", *(f"             {line.strip()}" for line in rest)])

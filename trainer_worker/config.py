"""What to train, as plain values. It refuses to know how any trainer spells them, and where the pictures came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("flux1", "tinyflux", "wan", "hunyuanvideo")
VIDEO_FAMILIES = ("wan", "hunyuanvideo")


@dataclass(frozen=True)
class TrainingConfig:
    """One training. `data_dir` and `output_dir` are private to the job: trainers write into both."""

    job_id: str
    family: str  # one of FAMILIES
    base_path: str  # a folder in diffusers layout, or a Hugging Face repository id
    data_dir: Path  # pictures (or videos), each with a .txt of the same stem
    output_dir: Path  # checkpoints and the final weights
    steps: int
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: int = 16  # must equal rank: the files carry no alpha, so ComfyUI scales by 1
    resolution: int = 1024  # pixels of a square's side
    batch_size: int = 1
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "adamw_bf16"
    precision: str = "bf16"  # of the frozen base weights: bf16, int8, int4, nf4, or a name of SimpleTuner's own
    gradient_checkpointing: bool = True
    checkpoint_every: int = 250
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 250
    seed: int = 42
    repeats: int = 0  # 0: each picture is seen once per epoch
    resume: bool = False  # continue from the newest checkpoint that can be read, if there is one
    trigger_word: str = ""
    flavour: str = ""  # of the family; empty: its first one
    video_frames: int = 49  # per clip; of the video families only
    checkpoints_kept: int = 2

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; allowed: {', '.join(FAMILIES)}")
        if self.alpha != self.rank:
            raise ValueError(f"alpha is {self.alpha}; it must equal rank, which is {self.rank}: the weights are saved without their alpha")
        for name in ("steps", "rank", "resolution", "batch_size", "checkpoint_every", "sample_every", "video_frames", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; allowed: more than 0")
        if min(self.repeats, self.warmup_steps) < 0:
            raise ValueError(f"repeats is {self.repeats}, warmup_steps is {self.warmup_steps}; allowed: 0 or more")
        if self.family == "hunyuanvideo" and self.video_frames % 4 != 1:
            raise ValueError(f"video_frames is {self.video_frames}; allowed for hunyuanvideo: one more than a multiple of 4")

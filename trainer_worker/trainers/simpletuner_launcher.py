"""Runs SimpleTuner's own train.py in this process and tells honestly how it went: 0 done, 1 failed, 130 interrupted.

Run by file name with SimpleTuner's interpreter, so it may import nothing of ours: `simpletuner_launcher.py [--own-tokenizers]`.
Its configuration comes by CONFIG_PATH. SimpleTuner 3.1.6 itself ends with 0 whatever happened.
"""

import importlib
import importlib.util
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DONE, FAILED, INTERRUPTED = 0, 1, 130
OWN_TOKENIZERS = "--own-tokenizers"


class Outcome:
    """What happened on the way, whatever SimpleTuner made of it."""

    def __init__(self) -> None:
        self.trained = False
        self.interrupted = False

    def interrupt(self, *_: object) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def exit_code(self) -> int:
        if self.trained:
            return DONE
        return INTERRUPTED if self.interrupted else FAILED


def define_missing_operators() -> None:
    """A torchvision made for CUDA cannot load its operators beside a CPU torch, and fails on the two it describes at import."""
    torch: Any = importlib.import_module("torch")
    if torch.version.cuda is not None:
        return
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # Its definitions last as long as the object.
        torch.fluxgate_torchvision = library
        importlib.import_module("torchvision")


def settle_on_cpu() -> None:
    """Without an accelerator: SimpleTuner pins memory in every batch, and no option turns that off."""
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def allow_offline_resume() -> None:
    """Offline, diffusers asks for the name of the weights even of a folder that holds them."""
    loader: Any = importlib.import_module("diffusers.loaders.lora_base")
    loader.HF_HUB_OFFLINE = False


def use_own_tokenizers() -> None:
    """The small model's folder has WordPiece tokenizers of 24 tokens; Flux's classes pad to 512 of theirs."""
    base = importlib.import_module("transformers").PreTrainedTokenizerFast

    class ShortTokenizer(base):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> Any:
            longest = self.model_max_length
            return super().__call__(*args, max_length=min(max_length or longest, longest), **kwargs)

    flux = importlib.import_module("simpletuner.helpers.models.flux.model").Flux
    for encoder in flux.TEXT_ENCODER_CONFIGURATION.values():
        encoder["tokenizer"] = ShortTokenizer


def note_when_trained(outcome: Outcome) -> None:
    trainer = importlib.import_module("simpletuner.helpers.training.trainer").Trainer
    train: Callable[..., Any] = trainer.train

    def train_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        outcome.trained = True
        return result

    trainer.train = train_and_note


def run(own_tokenizers: bool, outcome: Outcome) -> None:
    spec = importlib.util.find_spec("simpletuner")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"SimpleTuner is not installed for {sys.executable}")
    define_missing_operators()
    settle_on_cpu()
    if own_tokenizers:
        use_own_tokenizers()
    note_when_trained(outcome)
    allow_offline_resume()
    train_file = Path(spec.origin).with_name("train.py")
    sys.argv = [str(train_file)]
    runpy.run_path(str(train_file), run_name="__main__")


def main(arguments: list[str]) -> None:
    outcome = Outcome()
    # A shell's background job is started with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, outcome.interrupt)
    try:
        run(OWN_TOKENIZERS in arguments, outcome)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
    except SystemExit as error:
        print(f"SimpleTuner asked to exit with {error.code!r}.", file=sys.stderr)
    except Exception:  # noqa: BLE001  boundary: the exit code is all that is left to say it with
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Its threads (prefetching, uploads) would keep a process that has ended otherwise.
    os._exit(outcome.exit_code())


if __name__ == "__main__":
    main(sys.argv[1:])

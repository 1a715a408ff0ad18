"""Why a LoRA file is not taken: one error, with a code per reason. docs/loras.md lists the codes."""

from __future__ import annotations

from gateway.errors import Unprocessable


class LoraRefused(Unprocessable):
    """The file cannot become a LoRA here; `code` says why, `details` what was found and what is allowed."""

    code = "lora_refused"

"""Checkpoints as other versions wrote them."""

import hashlib
import json
from pathlib import Path
from typing import Any


def signed(checkpoint: Path, **meta: Any) -> None:
    """Give a checkpoint another meta.json, of which None leaves something out, and the checksums that belong to it."""
    file = checkpoint / "meta.json"
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **meta}.items() if v is not None}))
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["meta.json"] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    (checkpoint / "checksums.json").write_text(json.dumps(sums))

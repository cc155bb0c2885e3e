"""Damage files of a workspace in many ways."""

import hashlib
import json
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = shlex.split(
    "0 -1 1 2 3 7 -0.0 0.5 1e308 -1e-320 nan -inf inf 2147483648 4294967296 9223372036854775807 9223372036854775808"
)
NUMBERS.append("1" + "0" * 30)
VALUES = [*NUMBERS, "true", '""', '"x"', '"\\u0000"', '"../up"', '"a/b"', "[]", "[1]", '["corpus", "corpus"]', "{}"]
VALUES += ["{a = 1}", "[[[]]]", "1979-05-27T07:32:00Z", '"\\u202e\\n[red]"', f'"{"y" * 5000}"', "'''\n'''"]
# Settings whose large values are valid but slow.
LONG = {"steps", "batch_size", "sample_tokens", "layers", "mtp_heads", "width", "ffn_width", "compile", "eval_rows"}
JSONS: list[Any] = [None, True, -1, 0, 1e308, 10**30, "", "x", [], {}, [[]], {"a": 1}, float("nan"), float("inf")]
TOKENS = shlex.split("""
    '' - -- -h --help --version --name --set --set== --set=a --set=.=1 --set=a..b=1 --name= --name=.. --name=a/b
    --config --resume --config=corpus --config=. --config=/dev/null --config=/dev/zero --overwrite --dry-run --profile
    --set=data.tokenizer=/dev/zero --out=. --out=config.toml --out=corpus/0.txt
    --out=no/where.html --out=/dev/full --out=x.xyz --out= --start=nan --end=2 --floor=-1 --floor=nan --no-replay
    --target --target=corpus --general runs/base runs corpus nowhere [red] --gpu=H100 --gpu=x --gpus=0 --gpus=-1
    --gpus=x --utilisation=nan --utilisation=0 --utilisation=inf --flops=1e21 --params=-1 --params=1e400
    --params=1e-300 --params=1e300 --tokens=nan --tokens=1T --law=x --law=hoffmann fit memory lr --lr=nan --lr=1
    --lr=-inf --base-batch=0 --base-batch=8 --batch=1e300 --batch=k --gpu-memory=x --gpu-memory=1e400GiB
    --gpu-memory=-1 --gpu-memory=0 --resamples=-1 --resamples=2 --workers=0 --workers=x --language=xx --language=
    --language=de --language-model=tokens.bin --tokenizer=tokens.bin --tokenizer=tokenizer.json --flops=1e-300
    --flops=1e308 --tokens=1e308 --lr=1e308 --gpus=99999999999999999999
""")
TOKENS += ["\n", "a\nb", "\udcff", "--name=\udcff", "--name=\x01", "--name=" + "n" * 300, "--out=\udcff"]


class Damager:
    """Tool that damages files of a workspace and records what it did."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw, self.done = folder, draw, list[str]()

    def file(self, name: str) -> None:
        """Damage a file of any kind in a random way."""
        path, draw = self.folder / name, self.draw
        if not path.is_file():  # damaged before
            return
        content = path.read_bytes()
        ways: list[Callable[[], bytes]] = [
            lambda: b"",
            lambda: content[: int(draw.random() * len(content))],
            lambda: self._flipped(content),
            lambda: self._flipped(content),
            lambda: content + draw.randbytes(draw.choice([1, 8, 4096])),
            lambda: draw.randbytes(draw.choice([1, 16, 1024])),
            lambda: content[:8] + b"\xff" * 26 + content[34:],
            lambda: content[: len(content) // 2] + b"\x00" * 64 + content[len(content) // 2 :],
            lambda: content * 2,
            lambda: b"[" * 100_000,
            lambda: b"\xff\xfe" + content,
        ]
        way = draw.randrange(len(ways) + 5)
        if way < len(ways):
            path.write_bytes(ways[way]())
        else:
            path.unlink()
            if way == len(ways) + 1:
                path.mkdir()
            elif way == len(ways) + 2:
                path.symlink_to(path.name)  # a loop
            elif way == len(ways) + 3:
                path.symlink_to("nowhere")
            elif way == len(ways) + 4:
                path.write_bytes(content)
                path.chmod(0)
        self.done.append(f"{name}: way {way}")

    def _flipped(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(min(len(changed), self.draw.choice([1, 1, 3, 20]))):
            changed[self.draw.randrange(len(changed))] = self.draw.randrange(256)
        return bytes(changed)

    def toml(self, name: str, *, long: bool) -> None:
        """Write invalid settings as valid or almost valid TOML. Without `long`, avoid settings that are only slow."""
        path, draw = self.folder / name, self.draw
        lines = path.read_text().splitlines()
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(len(lines))
            key = lines[at].partition(" = ")[0]
            value = draw.choice(VALUES)
            if key in LONG and not long and value not in ("0", "-1", "1", "2", "3", "7", "nan"):
                value = draw.choice(["0", "2", "[]", "nan"])
            way = draw.randrange(8)
            if way < 5:
                lines[at] = f"{key} = {value}"
            elif way == 5:
                lines.insert(at, lines[at])
            elif way == 6:
                lines.insert(
                    at,
                    draw.choice(["[model]", "[x.y]", "unknown = 1", "a" + ".b" * 3000 + " = 1", "x = " + "[" * 5000]),
                )
            else:
                lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
            self.done.append(f"{name}: {lines[at][:100]}")
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

    def json_lines(self, name: str) -> None:
        """Change lines of JSON into other JSON."""
        path, draw = self.folder / name, self.draw
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        for _ in range(draw.choice([1, 2, 5]) if lines else 0):
            at = draw.randrange(len(lines))
            try:
                value = json.loads(lines[at])
            except (ValueError, RecursionError):  # damaged before
                continue
            lines[at] = json.dumps(self._changed(value))
            self.done.append(f"{name}: {lines[at][:150]}")
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

    def _changed(self, value: Any) -> Any:
        """Return the value with one element replaced, dropped or added."""
        draw = self.draw
        if isinstance(value, dict) and value and draw.random() < 0.9:
            key = draw.choice(list(value))
            if draw.random() < 0.25:
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: self._changed(value[key])}
        if isinstance(value, list) and value and draw.random() < 0.8:
            at = draw.randrange(len(value))
            return [*value[:at], self._changed(value[at]), *value[at + 1 :]]
        return draw.choice(JSONS)

    def checkpoint(self, folder: str) -> None:
        """Damage a checkpoint, and correct its checksums in half of the cases."""
        path, draw = self.folder / folder, self.draw
        names = sorted(p.name for p in path.iterdir())
        way = draw.randrange(8)
        if way < 5:
            victim = f"{folder}/{draw.choice(names)}"
            if victim.endswith(".json") and draw.random() < 0.7:
                self.json_lines(victim)
            else:
                self.file(victim)
        elif way == 5:
            a, b = draw.sample(names, 2)
            for x, y in ((a, "swap"), (b, a), ("swap", b)):
                (path / x).rename(path / y)
            self.done.append(f"{folder}: {a} and {b} swapped")
        elif way == 6:
            shutil.rmtree(path)
            draw.choice([path.touch, path.mkdir, lambda: path.symlink_to(path.name)])()
            self.done.append(f"{folder}: replaced")
        else:
            other = path.with_name("checkpoint-" + draw.choice(["1", "00000009", "9" * 30, "x", "\u0663"]))
            if not other.exists():  # the name of one renamed before
                path.rename(other)
                self.done.append(f"{folder}: renamed")
        if path.is_dir() and (path / "checksums.json").is_file() and draw.random() < 0.5:
            files = [p for p in sorted(path.iterdir()) if p.is_file() and p.name != "checksums.json"]
            sums = {p.name: [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for p in files}
            (path / "checksums.json").write_text(json.dumps(sums))
            self.done.append(f"{folder}: signed again")

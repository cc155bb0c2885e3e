"""Text with dirt of the kinds that crawled pages have, and what `llmfast clean` makes of it."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import llmfast
from examples.chapter.measures import token_losses
from llmfast.clean import clean
from llmfast.data import ByteTokenizer, load, pack
from llmfast.train import Config

SENTENCES = re.compile(r"[A-Z][^|>{}]*[.!?]\)?")  # a paragraph of them
LEAST_WORDS, LEAST_LETTERS = 12, 0.85  # of a paragraph, and the share of its words that are only letters
SIZES = (400, 3_000)  # characters of a document: shorter ones are left out, longer ones end after a paragraph
HELD_OUT = 6  # one document of so many is never trained on
COPIES = 3  # of every fifth document, in all
HEAD = "Home Docs Blog Log in\nWe use cookies to improve your visit. Accept all cookies\nShare this page\n\n"
FOOT = "\n\nPrevious 1 2 3 4 5 6 7 8 Next\nAll rights reserved. Terms of use and privacy policy\nBack to top\n"

Text = tuple[str, str]  # name and text


def documents(most: int | None) -> tuple[list[Text], list[Text]]:
    """Return documents of whole sentences to train on, and others that are held out."""
    texts = ((each.name, sentences(each.text)) for each in load("prose"))
    long = [each for each in texts if len(each[1]) >= SIZES[0]][:most]
    return [each for i, each in enumerate(long) if i % HELD_OUT], long[::HELD_OUT]


def sentences(text: str) -> str:
    """Return the paragraphs of a text that are sentences, up to a size; without code, lists and tables."""
    found, size = [], 0
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        letters = sum(word.strip(".,;:!?()'\"").isalpha() for word in words)
        if len(words) >= LEAST_WORDS and letters >= LEAST_LETTERS * len(words) and SENTENCES.fullmatch(" ".join(words)):
            size += len(paragraph) + 2
            if size > SIZES[1]:
                break
            found.append(paragraph.strip())
    return "\n\n".join(found)


def dirtied(plain: Iterable[Text]) -> Iterator[Text]:
    """Put a page's menus around each document, and copies, tables and repeated lines between them.

    The name of what has been put between begins with "dirt/".
    """
    for i, (name, text) in enumerate(plain):
        framed = HEAD + text + FOOT
        yield name, framed
        if i % 5 == 0:
            yield from ((f"dirt/copy {k}/{name}", f"{framed}{k} visitors\n") for k in range(1, COPIES))
        if i % 3 == 1:
            yield f"dirt/table/{name}", "\n".join(_row(f"{name} {k}") for k in range(30))
        if i % 5 == 3:
            yield f"dirt/line/{name}", (text.partition("\n")[0] + "\n") * 30


def prepare_texts(folder: Path, most: int | None) -> None:
    """Write plain.jsonl, dirty.jsonl, held-out.jsonl, and what cleaning makes of the last two."""
    done = folder / "counts.json"
    if done.exists():
        return
    plain, held_out = documents(most)
    dirty = list(dirtied(plain))
    for name, texts in {"plain": plain, "dirty": dirty, "held-out": held_out}.items():
        write(folder / f"{name}.jsonl", texts)
    for name in ("dirty", "held-out"):
        clean(folder / f"{name}.jsonl", folder / f"{name}-cleaned", overwrite=True)
    counts = counted(dirty, "")
    counts |= counted([(each["id"], each["text"]) for each in records(folder / "dirty-cleaned")], " kept")
    done.write_text(json.dumps(counts), encoding="utf-8")


def counted(texts: Sequence[Text], when: str) -> dict[str, int]:
    """Count the documents of a text, those of them that are dirt, and its characters."""
    return {
        f"documents{when}": len(texts),
        f"dirt{when}": sum(name.startswith("dirt/") for name, _ in texts),
        f"characters{when}": sum(len(text) for _, text in texts),
    }


def write(file: Path, texts: Iterable[Text]) -> None:
    """Write documents as lines of JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": name, "text": text}) + "\n" for name, text in texts)
    file.write_text("".join(lines), encoding="utf-8")


def records(place: Path) -> list[dict[str, Any]]:
    """Read a file that `write` has written, or the text in a folder that `llmfast clean` has."""
    files = [place] if place.is_file() else sorted((place / "text").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def losses_of_held_out(run: Path, config: Config) -> dict[str, Any]:
    """Measure the loss of all held-out documents, and of those that cleaning keeps."""
    model, texts, tokenizer = llmfast.load_run(run).model, run.parent / "texts", ByteTokenizer()
    every = records(texts / "held-out.jsonl")
    kept = {each["id"] for each in records(texts / "held-out-cleaned")}
    found: dict[str, Any] = {}
    for key, mine in {"all held out": every, "kept held out": [x for x in every if x["id"] in kept]}.items():
        rows = pack([tokenizer.encode(each["text"]) for each in mine], config.data.seq_len, tokenizer.eot_id)
        loss = torch.cat([torch.from_numpy(losses) for _, losses in token_losses(model, rows, config)])
        found[key] = round(float(loss.mean()), 5)
    return found | json.loads((texts / "counts.json").read_text(encoding="utf-8"))


def _row(seed: str) -> str:
    """Return 60 letters and digits that mean nothing, which follow from the seed."""
    return base64.b64encode(hashlib.sha512(seed.encode()).digest())[:60].decode()

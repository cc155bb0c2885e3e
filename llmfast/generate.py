"""The command `llmfast generate`: a trained model continues a text, or fills a gap in one, word by word."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfast._checks import expect
from llmfast._commands import INTERRUPTED, fail

if TYPE_CHECKING:
    from torch import Tensor

    from llmfast.data import Tokenizer
    from llmfast.models import Decoder
    from llmfast.models.sampling import Sampler
    from llmfast.train.loading import Opened

_HELD = 8  # tokens that may wait for the rest of a character
_BROKEN = "\ufffd"  # what a tokenizer decodes an incomplete character to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the parser of `llmfast generate`; `run` takes the parsed result."""
    parser.description = "Print what a trained model writes after a prompt, or into a gap, up to the end of text."
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a run, or one that was exported")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the text to continue; repeat it for several, each of which is printed above its text",
    )
    parser.add_argument("--prefix", metavar="TEXT", help="fill in the middle: the text before the gap")
    parser.add_argument("--suffix", metavar="TEXT", help="fill in the middle: the text after the gap")
    parser.add_argument(
        "--max-tokens", type=int, default=200, metavar="INT", help="stop after so many tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="NUMBER",
        help="0, the default, is greedy; 1 is the model's own",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="NUMBER",
        help="sample among the most likely tokens that together have this probability (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="INT", help="makes sampling repeatable")
    parser.add_argument("--device", default="auto", help="'auto', 'cpu', 'cuda', 'cuda:1', ... (default: %(default)s)")
    parser.add_argument(
        "--speculative",
        action=argparse.BooleanOptionalAction,
        help="let the model's further heads draft tokens that the next pass checks: the same text in fewer passes "
        "(default: if it has such heads)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate what the arguments say; return the exit code, 2 for a user's mistake."""
    try:
        _generate(args)
    except ImportError as e:
        advice = "" if "pip install" in str(e) else "; generating needs the extra: pip install 'llmfast-torch[train]'"
        return fail(f"{e}{advice}")
    except (ValueError, OSError) as e:
        return fail(str(e))
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    return 0


def _generate(args: argparse.Namespace) -> None:
    """Check everything, then load the weights and print."""
    import torch

    from llmfast.models.sampling import Sampler
    from llmfast.train.loading import open_run

    expect(args.max_tokens >= 1, f"--max-tokens must be at least 1; got {args.max_tokens}")
    greedy = args.temperature == 0
    unused = [f"--{name}" for name, given in (("top-p", args.top_p != 1), ("seed", args.seed is not None)) if given]
    expect(not greedy or not unused, f"{' and '.join(unused)} must come with a --temperature above 0")
    expect(args.seed is None or 0 <= args.seed < 2**63, f"--seed must be in [0, 2^63); got {args.seed}")
    Sampler(args.temperature, args.top_p)
    device = _device(args.device)
    opened = open_run(args.run_folder)
    prompts = [torch.as_tensor(ids, dtype=torch.int64, device=device) for ids in _prompt_ids(args, opened)]
    drafts = opened.shape is not None and opened.shape.mtp in ("parallel", "sequential") and opened.shape.targets > 1
    expect(drafts or not args.speculative, f"--speculative needs a model with further heads; {opened.folder} has none")

    generator = torch.Generator(device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    sampler = Sampler(args.temperature, args.top_p, generator)
    model = opened.model().to(device)
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1:
            _print(("\n" if i else "") + f"--- {args.prompt[i]}\n")
        made, count = _Made(), min(args.max_tokens, opened.context - len(prompt))
        if drafts and args.speculative is not False:
            tokens = _speculative(model, prompt, count, sampler, made)
        else:
            tokens = _plain(model, opened, prompt, count, sampler)
        ended = _write(tokens, opened, prompt, made)
        end = "" if ended or count == args.max_tokens else f"; stopped at the end of the context of {opened.context}"
        print(f"llmfast: {made}{end}", file=sys.stderr)


def _write(tokens: Iterator[int], opened: "Opened", prompt: "Tensor", made: "_Made") -> bool:
    """Print the text of tokens as they come; return True if the end of text came."""
    begun, ended = time.perf_counter(), False
    text = TextStream(opened.tokenizer, prompt.tolist())
    for token in tokens:
        if ended := token == opened.tokenizer.eot_id:
            break
        made.tokens += 1
        _print(text.put(token))
    _print(text.rest())
    if not text.ends_line:
        _print("\n")
    made.seconds = time.perf_counter() - begun
    return ended


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device must be usable here; got {name!r}: {str(e).splitlines()[0]}") from e


def _prompt_ids(args: argparse.Namespace, opened: "Opened") -> list[Any]:
    """Encode the prompts, or the two sides of the gap; ValueError if the model cannot continue that."""
    from llmfast.data import fim_prompt

    fills = args.prefix is not None or args.suffix is not None
    expect(fills != (args.prompt is not None), "give either --prompt, or --prefix and --suffix")
    if fills:
        settings, variant = opened.settings, 0
        if settings is not None and settings.data.fim_spm_rate == 1:
            variant = settings.data.fim_spm_variant
        prompts: list[Any] = [
            fim_prompt(opened.tokenizer, args.prefix or "", args.suffix or "", spm_variant=variant)  # type: ignore[arg-type]
        ]
        expect(
            settings is None or settings.data.fim_rate > 0,
            f"--prefix and --suffix need a model that was trained to fill in the middle; {opened.folder} has "
            "data.fim_rate=0",
        )
    else:
        expect("" not in args.prompt, "--prompt must not be empty: a text begins with its own first token")
        start, encode = opened.tokenizer.start_ids, opened.tokenizer.encode
        prompts = [[*start, *encode(prompt).tolist()] for prompt in args.prompt]
    for i, ids in enumerate(prompts, 1):
        which = f"--prompt {i} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        expect(
            len(ids) < opened.context,
            f"{which} must be shorter than the model's context of {opened.context} tokens; got {len(ids)}",
        )
    return prompts


class _Made:
    """Record of what was generated, for the line at the end."""

    def __init__(self) -> None:
        self.tokens, self.passes, self.seconds = 0, 0, 0.0
        self.guessed, self.accepted = Counter[int](), Counter[int]()

    def __str__(self) -> str:
        line = f"{self.tokens} tokens after the prompt, {self.tokens / max(self.seconds, 1e-9):,.0f} per second"
        if not self.passes:
            return line
        shares = (100 * self.accepted[k] / n for k, n in sorted(self.guessed.items()))
        accepted = ", ".join(f"{share:.0f} %" for share in shares) or "none made"
        return f"{line}; {self.tokens / self.passes:.2f} per pass, drafts accepted by head: {accepted}"


def _plain(model: Any, opened: "Opened", prompt: "Tensor", count: int, sampler: "Sampler") -> Iterator[int]:
    from llmfast.train.pretrained import stream_of

    tokens = stream_of(model, opened.tokenizer, prompt, context=opened.context, sampler=sampler)
    for _, token in zip(range(count), tokens):
        yield int(token)


def _speculative(model: "Decoder", prompt: "Tensor", count: int, sampler: "Sampler", made: _Made) -> Iterator[int]:
    from llmfast.mtp import speculative_passes

    for each in speculative_passes(model, prompt, count, sampler=sampler):
        made.passes += 1
        made.guessed.update(range(each.guessed))
        made.accepted.update(range(each.accepted))
        yield from each.tokens.tolist()


class TextStream:
    """Text of tokens that come one by one: each piece as soon as its last character is whole."""

    def __init__(self, tokenizer: "Tokenizer", before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = before[-_HELD:], list[int]()  # some tokenizers decode by what came before
        self.ends_line = False

    def put(self, token: int) -> str:
        """Add a token; return the text that is now certain, which may be empty."""
        self._new.append(token)
        text = self._text()
        return "" if text.endswith(_BROKEN) and len(self._new) < _HELD else self._release(text)

    def rest(self) -> str:
        """Return the text that has waited for more."""
        return self._release(self._text())

    def _text(self) -> str:
        known = len(self._tokenizer.decode(self._before))
        return self._tokenizer.decode(self._before + self._new)[known:]

    def _release(self, text: str) -> str:
        if self._new:
            self._before, self._new = self._new, []
        if text:
            self.ends_line = text.endswith("\n")
        return text


def _print(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()

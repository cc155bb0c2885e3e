import inspect
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.data import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from llmfast.data import tokenizer as module
from llmfast.data.tokenizer import LONGEST_WORD

ROOT = Path(__file__).parents[2]
TEXTS = [p.read_text("utf-8") for p in sorted(Path(json.__file__).parent.glob("*.py"))]
ODD = [
    "",
    " ",
    "  two  spaces \t\ttabs\n\n\n\r\nlines\u00a0\u2003\u200b",
    "👩‍👩‍👧‍👦 é e\u0301 中文 \U0001d518 \x00\x7f\ufeff",
    "def f(x):\n    return x  # 1234567890\n",
    *SPECIAL_TOKENS,
    f"a{SPECIAL_TOKENS[0]}b {SPECIAL_TOKENS[1]}{SPECIAL_TOKENS[0]}",
]
any_text = st.text() | st.lists(st.sampled_from(ODD)).map("".join)  # st.text() has no surrogates


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(TEXTS, 600)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())
    assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


@settings(deadline=None)
@given(text=any_text)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = TEXTS[:3] + ODD
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == len(texts)
    for ids, text in zip(batch, texts):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.special_ids
    assert tuple(ids) == SPECIAL_TOKENS and len(set(ids.values())) == len(SPECIAL_TOKENS)
    assert tokenizer.eot_id == ids["<|endoftext|>"] and max(ids.values()) < tokenizer.vocab_size
    mixed = [*ids.values(), *tokenizer.encode("héllo"), tokenizer.eot_id]
    assert tokenizer.decode(mixed) == "héllo"
    assert tokenizer.decode(list(ids.values())) == "" == tokenizer.decode([])


def test_decode_of_broken_utf8_and_foreign_ids(tokenizer: Tokenizer) -> None:
    cut = tokenizer.encode("中")[:-1] if tokenizer.vocab_size == 264 else tokenizer.encode("\U0001fae8")[:-1]
    assert len(cut) > 0 and set(tokenizer.decode(cut)) == {"\ufffd"}
    for ids in ([-1], [tokenizer.vocab_size]):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {tokenizer.vocab_size}\); got \[{ids[0]}\]"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match="one-dimensional"):
        tokenizer.decode([[1, 2]])


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert type(again) is type(tokenizer)
    assert (again.vocab_size, again.special_ids) == (tokenizer.vocab_size, tokenizer.special_ids)
    for text in TEXTS[:2] + ODD:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_pickle_keeps_special_text_ordinary(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    check_round_trip(again, f"a{SPECIAL_TOKENS[0]}b")
    np.testing.assert_array_equal(again.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_bytes_are_bytes() -> None:
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer.vocab_size % 8 == 0 and ByteTokenizer.eot_id == 256


def test_training_is_deterministic(bpe: BPETokenizer, tmp_path: Path) -> None:
    BPETokenizer.train(iter(TEXTS), 600).save(tmp_path / "same.json")
    bpe.save(tmp_path / "first.json")
    first = (tmp_path / "first.json").read_bytes()
    assert (tmp_path / "same.json").read_bytes() == first
    # Another process has other hash seeds.
    code = (
        "import json, sys; from pathlib import Path; from llmfast.data import BPETokenizer; "
        "texts = [p.read_text('utf-8') for p in sorted(Path(json.__file__).parent.glob('*.py'))]; "
        "BPETokenizer.train(texts, 600).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.json")], check=True, cwd=ROOT)
    assert (tmp_path / "other.json").read_bytes() == first


def test_training_compresses_and_fills_the_vocabulary(bpe: BPETokenizer) -> None:
    assert bpe.vocab_size == 600
    assert len(bpe.encode(TEXTS[-1])) < 0.7 * len(TEXTS[-1])
    assert BPETokenizer.train(["abc"], 600).vocab_size == 256 + len(SPECIAL_TOKENS)  # nothing to merge


def test_training_on_special_text_keeps_it_ordinary() -> None:
    pytest.importorskip("tokenizers")
    text = " ".join(SPECIAL_TOKENS * 50)
    check_round_trip(BPETokenizer.train([text], 400), text)


def test_training_arguments() -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="vocab_size must be at least 261; got 260"):
        BPETokenizer.train(TEXTS, 260)
    assert BPETokenizer.train(TEXTS[:1], 261).vocab_size == 261
    with pytest.raises(ValueError, match="texts"):
        BPETokenizer.train(["", ""])
    with pytest.raises(TypeError, match="one string"):
        BPETokenizer.train("text")


def test_missing_tokenizers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'llmfast-torch\[data\]'"):
        BPETokenizer.train(TEXTS, 600)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', "null", '{"type": "llmfast-bytes"}'])
def test_corrupt_files(tmp_path: Path, content: str) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json"):
        load_tokenizer(path)


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer file"):
        load_tokenizer(tmp_path / "broken.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is not a tokenizer file"):
        load_tokenizer(tmp_path / "deep.json")
    with pytest.raises(ValueError, match="/dev/zero is not a tokenizer file but a device"):
        load_tokenizer("/dev/zero")
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "missing.json")


def test_a_file_by_others(bpe: BPETokenizer, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe.save(tmp_path / "ours.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json"))
    assert theirs.decode(theirs.encode(TEXTS[0]).ids) == TEXTS[0]

    theirs.enable_truncation(5)  # as files saved by transformers often have
    theirs.enable_padding(length=100)
    theirs.save(str(tmp_path / "theirs.json"))
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "theirs.json").encode(TEXTS[0]), bpe.encode(TEXTS[0]))

    content = json.loads((tmp_path / "ours.json").read_text("utf-8"))
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|endoftext|>"]
    del content["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "no_eot.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=r"no <\|endoftext\|> token"):
        load_tokenizer(tmp_path / "no_eot.json")


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_a_file_of_a_model(eos: Any, bpe: BPETokenizer, tmp_path: Path) -> None:
    """Another token ends texts, and what the tokenizer puts around a text counts only in front of it."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<s>", "</s>"])
    begin, end = (backend.token_to_id(token) for token in ("<s>", "</s>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    backend.enable_padding(length=100)
    backend.save(str(path))
    settings = tmp_path / "tokenizer_config.json"
    for content in ({"eos_token": None}, {}):
        settings.write_text(json.dumps(content))
        assert (load_tokenizer(path).eot_id, load_tokenizer(path).start_ids) == (bpe.eot_id, ())
    settings.write_text(json.dumps({"eos_token": eos}))
    found = load_tokenizer(path)
    for tokenizer in (found, pickle.loads(pickle.dumps(found))):
        assert (tokenizer.eot_id, tokenizer.start_ids) == (end, (begin,))
        for text in TEXTS[:2]:
            np.testing.assert_array_equal(tokenizer.encode(text), bpe.encode(text))
        assert tokenizer.decode([begin, *bpe.encode("é </s>"), end]) == "é </s>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a tokenizer's settings"),
        ("[]", "is not a tokenizer's settings"),
        ('{"eos_token": 3}', "must name its eos_token; got 3"),
        ('{"eos_token": "</s>"}', "the tokenizer has no </s> token"),
    ],
)
def test_settings_next_to_a_file_that_do_not_fit(content: str, message: str, bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_ids_may_have_gaps(bpe: BPETokenizer, tmp_path: Path) -> None:
    """`vocab_size` is the size an embedding needs, one more than the highest id, not the number of ids."""
    bpe.save(tmp_path / "gaps.json")
    content = json.loads((tmp_path / "gaps.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 999
    (tmp_path / "gaps.json").write_text(json.dumps(content), "utf-8")
    gaps = load_tokenizer(tmp_path / "gaps.json")
    assert (gaps.vocab_size, bpe.vocab_size) == (1000, 600)
    assert gaps.decode([999]) == bpe.decode([599])
    for text in (*TEXTS, *ODD):
        check_round_trip(gaps, text)


LONG = {
    "one letter": "a" * 2_000_000,
    "letters": "".join(np.random.default_rng(0).choice(list("acgt"), 200_000)),
    "spaces": " " * 200_000 + "x",
    "lines": "\n" * 200_000,
    "signs": "=" * 200_000,
    "digits": "".join(np.random.default_rng(0).choice(list("0123456789"), 200_000)),
    "CJK": "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 50_000))),
}


def words_of(tokenizer: BPETokenizer, text: str) -> list[str]:
    """Return the words passed to BPE, with one character per byte."""
    return [word for word, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", LONG)
def test_a_long_word_is_cut_and_comes_back(kind: str, bpe: BPETokenizer) -> None:
    """Training takes time by the square of what is not cut: 2 MB of one letter never ended."""
    text = LONG[kind]
    assert max(map(len, words_of(bpe, text))) <= LONGEST_WORD * len(text[0].encode())
    start = time.perf_counter()
    trained = BPETokenizer.train([text, *TEXTS], 600)
    assert time.perf_counter() - start < 30
    for tokenizer in (trained, bpe):
        check_round_trip(tokenizer, text)


@settings(deadline=None)
@given(text=any_text)
def test_ordinary_text_has_the_words_of_gpt2(bpe: BPETokenizer, text: str) -> None:
    """Files of earlier versions therefore split it in the same way."""
    tokenizers = pytest.importorskip("tokenizers")
    gpt2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for some in (text, *TEXTS, *ODD):
        assert words_of(bpe, some) == [word for word, _ in gpt2.pre_tokenize_str(some)]


@pytest.mark.parametrize("call", ["BPETokenizer.train([text], 30_000)", "small.encode_batch([text] * 50)"])
def test_ctrl_c_is_heard(call: str) -> None:
    code = f"""if True:
        import random, signal
        from llmfast.data import BPETokenizer
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        words = [random.randbytes(4).hex() for _ in range(100_000)]
        text = " ".join(random.choices(words, k=500_000))
        small = BPETokenizer.train([text[:1000]], 300)
        print("ready", flush=True)
        try:
            {call}
        except KeyboardInterrupt:
            print("heard", flush=True)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        assert process.stdout.readline() == "heard\n"
        assert time.perf_counter() - start < 3
    assert process.returncode == 0


@pytest.mark.parametrize("kind", [ByteTokenizer, BPETokenizer])
def test_a_byte_order_mark_before_a_tokenizer_is_no_content(kind: type, bpe: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    (bpe if kind is BPETokenizer else ByteTokenizer()).save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert (
        load_tokenizer(path).encode("a b").tolist()
        == (bpe if kind is BPETokenizer else ByteTokenizer()).encode("a b").tolist()
    )


def test_ids_of_bytes_stay_what_they_are(tmp_path: Path) -> None:
    """Files of tokens and weights that were written with them mean the same for good."""
    names = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|pad|>"]
    tokenizer = ByteTokenizer()
    assert tokenizer.special_ids == {name: 256 + i for i, name in enumerate(names)}
    assert tokenizer.vocab_size == 264 and tokenizer.start_ids == () and tokenizer.decode([261, 262, 263, 97]) == "a"
    tokenizer.save(tmp_path / "tokenizer.json")
    saved = {"type": "llmfast-bytes", "vocab_size": 264, "special_tokens": names}
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == saved
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved | {"vocab_size": 272}))
    with pytest.raises(ValueError, match="has other byte tokens than this version's"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_what_occurs_twice_is_merged() -> None:
    pytest.importorskip("tokenizers")
    assert BPETokenizer.train(["ab\nab"], 600).vocab_size == 262 == BPETokenizer.train(["a b"], 600).vocab_size + 1
    assert inspect.signature(BPETokenizer.train).parameters["vocab_size"].default == 8192


def test_the_recipe_says_all_that_training_depends_on(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the cache are known by it: another version must not take them for its own."""
    tokenizers = pytest.importorskip("tokenizers")
    found = [BPETokenizer.recipe()]
    for place, name in ((tokenizers, "__version__"), (module, "_WORDS"), (module, "SPECIAL_TOKENS")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, "other")
            found.append(BPETokenizer.recipe())
    assert len({*found}) == 4 and BPETokenizer.of(bpe.text()).text() == bpe.text()


def test_a_text_always_has_the_same_ids(bpe: BPETokenizer, tmp_path: Path) -> None:
    content = json.loads(bpe.text())
    content["model"]["dropout"] = 0.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    text = "the tokenizer tokenizes the text " * 5
    for made in (BPETokenizer.load(path), BPETokenizer.of(path.read_text(encoding="utf-8"))):
        again = pickle.loads(pickle.dumps(made))
        made.save(tmp_path / "again.json")
        others = made, again, BPETokenizer.load(tmp_path / "again.json")
        assert all(np.array_equal(one.encode(text), bpe.encode(text)) for one in others for _ in range(5))
    import tokenizers

    pieces = [("<unk>", 0.0), (SPECIAL_TOKENS[0], -20.0), ("a", -1.0), ("b", -1.5), ("ab", -1.4), ("ba", -1.6)]
    for nbest_size in (None, 8):
        model = tokenizers.models.Unigram(pieces, unk_id=0, alpha=0.1, nbest_size=nbest_size)
        sampling = BPETokenizer(tokenizers.Tokenizer(model))
        assert len({tuple(sampling.encode("ab" * 8).tolist()) for _ in range(20)}) == 1


def test_what_is_no_text_is_named(tokenizer: Tokenizer) -> None:
    for texts in ([b"a"], ["a", None], [("a", "b")], [3]):
        with pytest.raises(TypeError, match=rf"^a text must be a string; got {type(texts[-1]).__name__}$"):
            tokenizer.encode_batch(texts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^a text must be valid Unicode; got '\\udce9' at character 3$"):
        tokenizer.encode_batch(["caf\u00e9", "caf\udce9"])
    with pytest.raises(TypeError, match="got bytes"):
        tokenizer.encode(b"caf")  # type: ignore[arg-type]


@pytest.mark.parametrize("inside", ["the main thread", "another thread"])
def test_long_calls_give_and_raise_what_short_ones_do(
    inside: str, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long call runs in a thread of its own, unless it is in another one already: then none is made."""
    started: list[str] = []
    start = threading.Thread.start
    monkeypatch.setattr(module, "_LARGE", 5)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))

    def calls() -> None:
        found.append([ids.tolist() for ids in bpe.encode_batch(["def f", "x"])])
        with pytest.raises(ValueError, match=r"must be valid Unicode; got '\\udce9' at character 5$"):
            bpe.encode("long \udce9")
        assert BPETokenizer.train(["ab\nab " * 9], 270).vocab_size > 261

    found: list[Any] = []
    if inside == "the main thread":
        calls()
        assert len(started) == 3
    else:
        (thread := threading.Thread(target=calls)).start()
        thread.join()
        assert started == [thread.name]
    monkeypatch.setattr(module, "_LARGE", 1 << 20)
    assert found == [[bpe.encode("def f").tolist(), bpe.encode("x").tolist()]]

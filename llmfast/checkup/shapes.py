"""Sizes for the benchmarks and the check-up: output layers and parameters of models, and small ones."""

# Width D and vocabulary V of the output layers of GPT-2, Llama-3 8B, Gemma-2 2B and Qwen-3 4B.
MODELS = {
    "GPT-2": (768, 50257),
    "Llama-3": (4096, 128256),
    "Gemma-2": (2304, 256000),
    "Qwen-3": (2560, 151936),
}
TOKENS = (1024, 8192, 16384, 65536)

# Small enough to run in the interpreter, but with realistic proportions.
SMALL = {"N": 1024, "D": 256, "V": 16384}
SMALL_HEADS = {"K": 4, "N": 256, "D": 256, "V": 8192}
# Multi-token prediction with four heads, at the sizes of Llama-3 and of DeepSeek-V3 (which trains fewer).
HEADS = [{"K": 4, "N": 8192, "D": D, "V": V} for D, V in (MODELS["Llama-3"], (7168, 129280))]


def _gpt2() -> list[tuple[int, ...]]:
    layer: list[tuple[int, ...]] = [
        *((768,), (768,), (2304, 768), (2304,), (768, 768), (768,)),
        *((768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)),
    ]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def _llama(width: int, ffn_width: int, kv_width: int, layers: int, *, tied: bool) -> list[tuple[int, ...]]:
    layer: list[tuple[int, ...]] = [
        *((width, width), (kv_width, width), (kv_width, width), (width, width)),
        *((ffn_width, width), (ffn_width, width), (width, ffn_width), (width,), (width,)),
    ]
    embeddings: list[tuple[int, ...]] = [(128256, width)] * (1 if tied else 2)
    return [*embeddings, *layer * layers, (width,)]


# The shapes of all parameters.
PARAMETERS = {
    "124M": _gpt2(),  # GPT-2
    "1B": _llama(2048, 8192, 512, 16, tied=True),  # Llama-3.2 1B
    "8B": _llama(4096, 14336, 1024, 32, tied=False),  # Llama-3 8B
}

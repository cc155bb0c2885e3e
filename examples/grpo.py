"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) of a small GPT, without logits.

The policy is rewarded for the letter e. Each prompt is continued several times, each time at another temperature, and
each reward is compared with the mean of its prompt's rewards. Two updates follow, with the clipped ratio to the old
policy and a bonus for entropy. All sequences are packed into one row, and no logits exist in training.

python examples/grpo.py
"""

from collections.abc import Callable

import torch
from tiny_gpt import Packing, TinyGPT
from torch import Tensor

from llmfast.losses import linear_logprobs
from llmfast.optim import FusedAdamW

PROMPTS = [b"the", b"a tree", b"one", b"we see"]
CLIP, BONUS, LENGTH = 0.2, 1e-3, 8


@torch.no_grad()
def sampled(policy: TinyGPT, prompt: Tensor, temperatures: Tensor) -> Tensor:
    """Continue a prompt (T,) once at each temperature."""
    rows = prompt.expand(len(temperatures), -1)
    for _ in range(LENGTH):
        logits = policy.head(policy(rows)[:, -1]) / temperatures[:, None]
        rows = torch.cat([rows, torch.multinomial(logits.softmax(-1), 1)], 1)
    return rows


def statistics(policy: TinyGPT, packed: Packing, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each token, (1, T), at its own temperature."""
    hidden, weight = policy(packed.tokens, packed), policy.head.weight
    options = {"temperature": temperatures[packed.sequence][None], "return_stats": True}
    found, stats = linear_logprobs(hidden, weight, packed.ids, **options)  # llmfast
    return found, stats.entropy


def clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return the gain of each token, without a reward for moving further than CLIP from the old policy."""
    return torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def train(
    steps: int, group: int = 8, device: str = "cpu", statistics: Callable[..., tuple[Tensor, Tensor]] = statistics
) -> tuple[list[float], list[float]]:
    """Return the loss of each update and the mean reward of each step."""
    torch.manual_seed(0)
    policy = TinyGPT().to(device)
    optimizer = FusedAdamW(policy.parameters(), lr=3e-3)  # llmfast
    losses, rewards = [], []
    for _ in range(steps):
        sequences, lengths, advantages, each = [], [], [], []
        for text in PROMPTS:
            prompt, temperatures = torch.tensor([*text], device=device), torch.linspace(0.7, 1.3, group, device=device)
            rows = sampled(policy, prompt, temperatures)
            reward = (rows[:, len(prompt) :] == ord("e")).float().mean(1)
            advantages.append((reward - reward.mean()) / (reward.std() + 1e-4))
            sequences += [*rows]
            lengths += [len(prompt)] * group
            each.append(temperatures)
            rewards.append(reward.mean())
        packed, temperatures = Packing(sequences, lengths), torch.cat(each)
        known = packed.ids != -100
        advantage = torch.cat(advantages)[packed.sequence][None]
        with torch.no_grad():
            old, _ = statistics(policy, packed, temperatures)
        for _ in range(2):
            new, entropy = statistics(policy, packed, temperatures)
            ratio = (new - old).exp()
            gain = clipped(ratio, advantage) + BONUS * entropy
            loss = -gain[known].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, torch.stack(rewards).view(steps, -1).mean(1).tolist()


if __name__ == "__main__":
    _, rewards = train(30, device="cuda" if torch.cuda.is_available() else "cpu")
    print(f"share of the letter e: {rewards[0]:.2f} -> {rewards[-1]:.2f}")

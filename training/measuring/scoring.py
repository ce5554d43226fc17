"""What a model makes of an answer: likelihoods of given answers, and greedy answers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def choice_logprobs(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Log-probability of each token of each choice after `prompt`.

    The prompt is read once; its key-value cache is then repeated for all choices.
    """
    import torch

    device = model.device
    with torch.inference_mode():
        read = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
        first = torch.log_softmax(read.logits[0, -1].float(), -1)
        longest = max(len(choice) for choice in choices)
        # Padding stands to the right, where a causal model cannot see it from the tokens that count.
        padded = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices], device=device)
        scores = first[padded[:, :1]]
        if longest > 1:
            read.past_key_values.batch_repeat_interleave(len(choices))
            rest = model(padded[:, :-1], past_key_values=read.past_key_values).logits
            following = torch.log_softmax(rest.float(), -1).gather(2, padded[:, 1:, None])[..., 0]
            scores = torch.cat([scores, following], 1)
    return [row[: len(choice)].tolist() for row, choice in zip(scores, choices, strict=True)]


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy answers, without the end token, in the order of `prompts`. Batches hold prompts of like length."""
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    generator: Any = model  # PEFT's wrapper has no types
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), end)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):  # padding stands to the left, so that all answers begin together
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = generator.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        for row, i in enumerate(batch):
            tokens = out[row, width:].tolist()
            answers[i] = tokens[: tokens.index(end)] if end in tokens else tokens
    return answers

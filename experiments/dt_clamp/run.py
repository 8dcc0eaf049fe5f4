"""How far does the time-step clamp of transformers move the logits, and does its cached decode agree with its pass?

`python experiments/dt_clamp/run.py` prints what README.md beside this file asks for.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from zamba2_jax import decode_step, prefill, save_hf
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.parity.ours import random_model
from zamba2_jax.parity.variants import VARIANTS

PROMPT, LENGTH = 8, 45


def transformers_logits(directory: Path, tokens: np.ndarray, time_step_min: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits after every token from PROMPT on, by one full pass and by prefill and cached steps."""
    config = transformers.Zamba2Config.from_pretrained(directory, time_step_min=time_step_min)
    model = transformers.Zamba2ForCausalLM.from_pretrained(directory, config=config).eval()
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, PROMPT - 1 :]
        out = model(ids[:, :PROMPT], use_cache=True)
        steps = [out.logits[:, -1]]
        for i in range(PROMPT, LENGTH):
            out = model(ids[:, i : i + 1], use_cache=True, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    return whole.numpy(), torch.stack(steps, 1).numpy()


def our_logits(model: LanguageModel, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same two ways, here."""
    logits, cache = prefill(model, tokens[:, :PROMPT], capacity=LENGTH)
    steps = [logits]
    for i in range(PROMPT, LENGTH):
        logits, cache = decode_step(model, tokens[:, i], cache)
        steps.append(logits)
    return np.asarray(model(tokens)[:, PROMPT - 1 :]), np.stack(steps, 1)


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    case = VARIANTS["7b-miniature"]
    model = random_model(case.config, seed=0)
    for layer in model.layers:
        layer.mamba.dt_bias[...] -= 4
    tokens = case.tokens(0).tokens
    with tempfile.TemporaryDirectory() as scratch:
        save_hf(model, Path(scratch) / "model")
        clamped, clamped_steps = transformers_logits(Path(scratch) / "model", tokens, 0.001)
        free, free_steps = transformers_logits(Path(scratch) / "model", tokens, 1e-30)
    ours, our_steps = our_logits(model, tokens)
    print(f"largest logit {np.abs(ours).max():.2f}; largest difference of a logit between")
    for name, a, b in (
        ("transformers as configured: full pass and cached steps", clamped, clamped_steps),
        ("transformers without clamp: full pass and cached steps", free, free_steps),
        ("zamba2_jax: full pass and cached steps", ours, our_steps),
        ("full passes: zamba2_jax and transformers as configured", ours, clamped),
        ("full passes: zamba2_jax and transformers without clamp", ours, free),
    ):
        print(f"  {name:58}{np.abs(a - b).max():.1e}")


if __name__ == "__main__":
    main()

"""Llama-3.2-1B's and -3B's exact configurations, with random weights, against transformers. Minutes; not run by pytest.

    python tests/full_size.py                       1B, whole: 5 GB on disk in fp32, about 11 GB of memory
    python tests/full_size.py --size 3B --layers 4  3B's, cut in depth
    python tests/full_size.py --save FOLDER         only write a model of that size, with the digit tokenizer, to train on

Prints the largest difference of the logits over a 64-token prompt, whether greedy decoding with the cache, forked and rolled
back, gives transformers' tokens, and the peak memory of loading with one more row of embedding (of a model cut in depth, where
the embedding is most of it, this means little). Exits with 1 if one is wrong.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import Tokenizer  # noqa: E402
from model import KVCache, Llama, LlamaConfig  # noqa: E402

SIZES = {"1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
         "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
LOAD = """
import re, sys
from model import Llama
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024       # Linux alone has it
before = peak()
model = Llama.from_pretrained(sys.argv[1], vocab_size=128257)
assert model.lm_head.weight.shape[0] == 128257
sum(float(p.sum()) for p in model.parameters())          # touches every page
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@torch.inference_mode()
def greedy(model: Llama, prompt: torch.Tensor, new: int) -> list[list[int]]:
    """Two rows of `new` tokens: one decoded straight on, one that first strays for three tokens and is rolled back."""
    cache = KVCache(model.config, 1, prompt.shape[1] + new + 3, "cpu", torch.float32)
    last = model(prompt, cache=cache)[:, -1]
    cache.fork(torch.tensor([0, 0]))
    model(torch.tensor([[11, 12, 13], [14, 15, 16]]), cache=cache)
    cache.rollback(torch.full((2,), prompt.shape[1]))
    tokens = [last.argmax(-1).expand(2)]
    while len(tokens) < new:
        tokens.append(model(tokens[-1][:, None], cache=cache)[:, -1].argmax(-1))
    return torch.stack(tokens, 1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--save", help="a folder for our model with random weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = SIZES[args.size] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = transformers.LlamaConfig(
        vocab_size=128256, intermediate_size=8192, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=ROPE, tie_word_embeddings=True, **shape)
    if args.save:
        tok = Tokenizer.digits()
        config.eos_token_id = tok.eos
        Llama(LlamaConfig.from_dict(config.to_dict())).save_pretrained(args.save)
        tok.save_pretrained(args.save)
        return
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.save_pretrained(folder, max_shard_size="2GB")
        load = subprocess.run([sys.executable, "-c", LOAD, folder], cwd=ROOT, check=True, capture_output=True, text=True)
        ours = Llama.from_pretrained(folder, dtype=torch.float32)
        prompt = torch.randint(0, 128000, (1, 64))
        with torch.inference_mode():
            difference = float((ours(prompt) - theirs(prompt).logits).abs().max())
            expected = theirs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)[0, 64:].tolist()
        equal = greedy(ours, prompt, 16) == [expected, expected]
        ratio = float(load.stdout)
        parameters = sum(map(torch.numel, ours.parameters()))
        print(f"Llama-3.2-{args.size}, {shape['num_hidden_layers']} layers, {parameters:,} parameters")
        print(f"logits: largest difference {difference:.1e}; greedy with fork and rollback equal: {equal}; "
              f"loading: {ratio:.2f} times the model at its peak")
    sys.exit(difference > 1e-4 or not equal or ratio > 1.2 and not args.layers)


if __name__ == "__main__":
    main()

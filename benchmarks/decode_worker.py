"""Decodes on request, for neighbours.py: a process of its own for one model and one source tree.

    python benchmarks/decode_worker.py TREE MODEL[:int8|int4]

Prints {"threads": n} when the model is loaded, then for each number of tokens that it reads one
line: {"tokens_per_second": of one greedy answer without its prompt, "cpu_seconds": of the whole
process since the number came}.
"""

import json
import sys
import time

sys.path.insert(0, sys.argv[1])

from runtime import Engine, SamplingParams  # first: it bounds the waiting of torch's threads

import torch  # isort: skip


def decode(engine, prompt, tokens: int) -> dict:
    params = SamplingParams(
        max_tokens=tokens, temperature=0, repetition_penalty=1.0, ignore_eos=True
    )
    start = time.process_time()
    [result] = engine.generate([prompt], params)
    return {
        "tokens_per_second": (tokens - 1) / result.metrics["decode_seconds"],
        "cpu_seconds": time.process_time() - start,
    }


def main():
    model, _, packed = sys.argv[2].partition(":")
    engine = Engine(model, vision="torch", max_model_len=1024, cpu_weights=packed or "float")
    prompt = engine.prompt([{"role": "user", "content": "hello"}])
    decode(engine, prompt, 16)  # the first steps are slower
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decode(engine, prompt, int(line))), flush=True)
    engine.close()


if __name__ == "__main__":
    main()

"""Trains the demo model on a CPU: python examples/demo/train.py --out DIR. Every stage can be stopped and resumed.

tower     the encoder learns to write the scene's code into its rows (few patches at first, whole grids at the end)
language  the decoder learns to answer from ideal codes; needs no images, so it may run beside `tower`
relate    the same with mostly relation questions
read      the decoder continues with what the tower really writes about images (tower fixed)
save      writes a checkpoint in the release's layout: fp16 safetensors, config.json, tokenizer
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from batches import (
    SEED,
    WEIGHTS,
    Questions,
    answer_loss,
    draw_patches,
    draw_scenes,
    num_patches,
    stream,
)
from net import Decoder, make_config, make_tower, save_release, see
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from targets import (
    PairHeads,
    PatchHeads,
    codebook,
    doubtful,
    patch_owner,
    row_features,
    row_labels,
    row_loss,
    table,
)
from tokenizer import Tokenizer, build
from torch import nn

STAGES = {"tower": 1, "language": 2, "read": 4, "relate": 5}  # numbers the random streams
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class Tower(nn.Module):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.tower = make_tower(config)
        self.heads = PatchHeads(config["eva_config"]["hidden_size"])
        self.codes = codebook(config["hidden_size"])

    def loss(self, step, args):
        rng = stream(STAGES["tower"], step, RANK)
        scenes = draw_scenes(rng, args.batch)
        objects = table(scenes)
        owner = patch_owner(objects)
        patches, keep = draw_patches(scenes, rng, owner, num_patches(step, args))
        positions = None
        if keep is not None:
            owner = np.take_along_axis(owner, keep, axis=1)
            positions = torch.from_numpy(keep)
        with torch.autocast("cpu", torch.bfloat16):
            rows, tokens = see(self.tower, patches, positions)
        loss, right = row_loss(rows.float(), row_labels(objects), self.codes)
        patch = self.heads(tokens, objects, owner, keep)
        return loss + patch, {"rows": loss.item(), "patch": patch.item(), **right}


class Language(nn.Module):
    name = "language"
    weights = WEIGHTS

    def __init__(self, config, tokenizer):
        super().__init__()
        self.decoder = Decoder(config)
        self.pairs = PairHeads(config["hidden_size"])
        self.questions = Questions(tokenizer, self.weights)
        self.pad = config["pad_token_id"]
        self.codes = codebook(config["hidden_size"])

    def loss(self, step, args):
        rng = stream(STAGES[self.name], step, RANK)
        scenes = draw_scenes(rng, args.batch)
        objects = table(scenes)
        labels = row_labels(objects)
        rows = doubtful(row_features(labels), labels, rng.uniform(0.5, 4.0)) @ self.codes
        rows = rows + args.blur * torch.from_numpy(rng.standard_normal(rows.shape, np.float32))
        owners, turns, pairs = self.questions.sample(scenes, args.per_scene, rng)
        taps = []
        drop = step < args.steps * args.partial
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(
                self.decoder, turns, rows[owners], self.pad, drop, taps, self.questions.marks(turns)
            )
        pair = self.pairs(taps, objects, pairs) if pairs else loss.new_zeros(())
        return loss + 0.5 * pair, {"answer": loss.item(), "pair": pair.item()}


class Relate(Language):
    """Language with more questions of the hardest kind."""

    name = "relate"
    weights = {**WEIGHTS, "relation": 15.0}


class Read(nn.Module):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.decoder = Decoder(config)
        self.eye = [make_tower(config)]  # in a list: not part of this stage's state
        self.blind = True  # until the trained tower is loaded
        self.questions = Questions(tokenizer)
        self.pad = config["pad_token_id"]

    def loss(self, step, args):
        if self.blind:
            load_part(self.eye[0], "tower", args.out / "tower.pt")
            self.blind = False
        rng = stream(STAGES["read"], step, RANK)
        scenes = draw_scenes(rng, args.batch)
        patches, _ = draw_patches(scenes, rng, None, 256)
        owners, turns, _ = self.questions.sample(scenes, args.per_scene, rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                rows, _ = see(self.eye[0], patches)
            loss = answer_loss(self.decoder, turns, rows.float()[owners], self.pad)
        return loss, {"answer": loss.item()}


def make_stage(name, config, tokenizer):
    torch.manual_seed(SEED + STAGES[name])
    stages = {"tower": Tower, "language": Language, "relate": Relate, "read": Read}
    return stages[name](config, tokenizer)


def optimizers(module, rate):
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inside = []
    rest = []
    for name, p in module.named_parameters():
        matrix = p.dim() == 2 and ("blocks" in name or "layers" in name)
        (inside if matrix else rest).append(p)
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step, args):
    """Learning rate: linear warm-up over 100 steps, flat, then linear to zero over the last `decay` part."""
    warm_up = (step + 1) / 100
    decay = (args.steps - step) / max(args.steps * args.decay, 1)
    return min(warm_up, decay, 1.0) * args.rate


def load_part(module, part, path):
    """Loads the weights named `part`.* of the state in `path` into the module."""
    saved = torch.load(path, weights_only=True)["model"]
    prefix = part + "."
    own = {name.removeprefix(prefix): v for name, v in saved.items() if name.startswith(prefix)}
    module.load_state_dict(own)


def begin(name, module, out):
    """Starts a stage: the first two keep their fresh weights, the others take the decoder of the stage before."""
    before = {"relate": "language", "read": "relate"}.get(name)
    if before:
        load_part(module.decoder, "decoder", out / f"{before}.pt")


def train(name, args, config, tokenizer, progress):
    module = make_stage(name, config, tokenizer)
    path = args.out / f"{name}.pt"
    tools = optimizers(module, args.rate)
    step = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["model"])
        for tool, state in zip(tools, saved["tools"]):
            tool.load_state_dict(state)
        step = saved["step"]
    else:
        begin(name, module, args.out)
    bar = progress.add_task(name, total=args.steps, completed=step)
    started = time.time()
    log = Log(args.out / f"{name}.log")
    while step < args.steps:
        advance(module, tools, step, args, log)
        step += 1
        progress.update(bar, completed=step)
        if RANK == 0 and (step % args.every == 0 or step == args.steps):
            log.write(step, rate_at(step, args), time.time() - started)
            keep(path, module, tools, step)


def advance(module, tools, step, args, log):
    loss, numbers = module.loss(step, args)
    loss.backward()
    average_gradients(module)
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for tool in tools:
        for group in tool.param_groups:
            group["lr"] = rate_at(step, args)
        tool.step()
        tool.zero_grad()
    log.add(numbers)


def average_gradients(module):
    """Averages over the processes of torchrun: two processes with a thread each are faster than one with two."""
    if WORLD > 1:
        gradients = [p.grad for p in module.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / WORLD).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


def keep(path, module, tools, step):
    """Saves the state under a temporary name first: a killed run leaves the previous state whole."""
    aside = path.with_suffix(".tmp")
    torch.save(
        {"model": module.state_dict(), "tools": [t.state_dict() for t in tools], "step": step},
        aside,
    )
    os.replace(aside, path)


class Log:
    """Appends the means of the numbers since the last line to a text file."""

    def __init__(self, path):
        self.path = path
        self.rows = []

    def add(self, numbers):
        self.rows.append(numbers)

    def write(self, step, rate, seconds):
        means = {k: float(np.mean([r[k] for r in self.rows])) for k in self.rows[0]}
        with self.path.open("a") as file:
            numbers = " ".join(f"{k}={v:.3f}" for k, v in means.items())
            file.write(f"{step} {seconds:.0f}s lr={rate:.1e} {numbers}\n")
        self.rows = []


def save(out, folder, config, tokenizer):
    """The states of `tower` and `read` as a released checkpoint."""
    tower = make_tower(config)
    decoder = Decoder(config)
    load_part(tower, "tower", out / "tower.pt")
    load_part(decoder, "decoder", out / "read.pt")
    folder.mkdir(parents=True, exist_ok=True)
    save_release(folder, config, tower, decoder)
    build(folder)
    greedy = {"do_sample": False, "max_length": 1024, "repetition_penalty": 1.0}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps({**greedy, **ids}, indent=2))
    for path in folder.iterdir():  # safetensors writes files that only their owner can read
        path.chmod(0o644)


# fmt: off
DEFAULTS = {
    "tower":    {"steps": 3000, "batch": 32, "rate": 2e-3, "decay": 0.5, "partial": 0.9, "per_scene": 0},
    "language": {"steps": 1500, "batch": 16, "rate": 2e-3, "decay": 0.5, "partial": 0.9, "per_scene": 4},
    "relate":   {"steps": 2000, "batch": 16, "rate": 4e-3, "decay": 0.5, "partial": 0.9, "per_scene": 6},
    "read":     {"steps": 300, "batch": 12, "rate": 6e-4, "decay": 0.7, "partial": 0.0, "per_scene": 5},
}
# fmt: on


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="states of the stages, logs, and checkpoint/"
    )
    parser.add_argument("--stage", choices=[*STAGES, "save", "all"], default="all")
    parser.add_argument("--steps", type=int, help="steps of the stage (default: as published)")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--batch", type=int, help="scenes per step")
    parser.add_argument(
        "--keep", type=int, default=96, help="patches per picture in the first part of `tower`"
    )
    parser.add_argument("--per-scene", type=int, help="questions per scene")
    parser.add_argument(
        "--blur", type=float, default=0.05, help="noise on the ideal codes in `language`"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between saves and log lines")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def settings(args, stage: str) -> argparse.Namespace:
    """The flags, with the stage's defaults where none was given."""
    given = {}
    for key in ("steps", "rate", "batch", "per_scene"):
        if getattr(args, key) is not None:
            given[key] = getattr(args, key)
    return argparse.Namespace(**{**vars(args), **DEFAULTS[stage], **given})


def stages_of(args) -> list[str]:
    if args.stage == "all":
        return list(DEFAULTS)
    return [args.stage] if args.stage in DEFAULTS else []


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    if WORLD > 1:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        build(args.out)
    if WORLD > 1:
        dist.barrier()
    tokenizer = Tokenizer(args.out)
    config = make_config(tokenizer)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for name in stages_of(args):
            train(name, settings(args, name), config, tokenizer, progress)
    if args.stage in ("save", "all") and RANK == 0:
        save(args.out, args.out / "checkpoint", config, tokenizer)


if __name__ == "__main__":
    main()

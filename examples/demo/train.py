"""Train the demo model on a CPU: python examples/demo/train.py --out DIR. Every stage can be stopped and resumed.

  tower     the encoder learns to write the scene's code into its rows (patches dropped first, whole grids at the end)
  language  the decoder learns to answer from ideal codes; needs no pictures, so it may run beside `tower`
  read      the decoder goes on with what the tower really writes about pictures (tower fixed, newest state)
  join      both together on pictures and questions
  save      weights as a released checkpoint: fp16 safetensors, config.json, tokenizer
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

from net import ROWS, Decoder, make_config, make_tower, save_release, see
from questions import KINDS, LANGUAGES, ask
from scenes import draw_mixed, sample_scene
from targets import PATCH, PatchHeads, codebook, doubtful, patch_owner, row_features, row_labels, row_loss, table
from tokenizer import Tokenizer, build

SEED = 1
STAGES = {"tower": 1, "language": 2, "join": 3, "read": 4}         # the number separates the stages' random streams
WEIGHTS = {"relation": 3.0, "extreme": 2.0, "count_shape": 2.0, "describe": 1.5, "size": 1.5, "exists": 1.5}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
FULLNESS = (0.1, 0.2, 0.3, 0.4)


# ------------------------------------------------------------------------------------------------------------- data

def stream(stage: str, step: int) -> np.random.Generator:
    """Each step draws from its own seed, so a resumed run sees what an uninterrupted one would."""
    return np.random.default_rng([SEED, STAGES[stage], step, RANK])


def draw_scenes(rng, count):
    """Fuller scenes more often than the grammar has them: sorting three or four objects is what takes longest to learn."""
    return [sample_scene(rng, rng.random() < 0.3, int(rng.choice(4, p=FULLNESS)) + 1) for _ in range(count)]


def cut(pictures: np.ndarray) -> np.ndarray:
    """[B, 224, 224, 3] -> patches [B, 256, 14, 14, 3] in row-major order."""
    grid = pictures.reshape(len(pictures), 16, PATCH, 16, PATCH, 3)
    return grid.swapaxes(2, 3).reshape(len(pictures), 256, PATCH, PATCH, 3)


def draw_patches(scenes, rng, owner, keep_count):
    """Patches of the drawn scenes: all of them, or `keep_count` with those under objects first."""
    patches = cut(np.stack([draw_mixed(scene, rng) for scene in scenes]))
    if keep_count >= 256:
        return torch.from_numpy(patches), None
    urgency = rng.random(owner.shape) + 0.8 * (owner >= 0)
    keep = np.argsort(-urgency, axis=1)[:, :keep_count]
    return torch.from_numpy(np.take_along_axis(patches, keep[..., None, None, None], axis=1)), keep


def kept(step, args):
    """Few patches in most steps, the whole grid in every fourth and in all at the end: attention must not miss the paper."""
    return 256 if step % 4 == 0 or step >= args.steps * args.partial else args.keep


class Questions:
    """Batches of tokenised turns."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.weights = np.array([WEIGHTS.get(kind, 1.0) for kind in KINDS])
        self.weights /= self.weights.sum()

    def sample(self, scenes, per_scene, rng):
        """-> rows' owners, and (ids, start of rows, answer ids) of each turn."""
        owners, turns = [], []
        for b, scene in enumerate(scenes):
            while len(turns) < (b + 1) * per_scene:
                turn = ask(scene, KINDS[rng.choice(len(KINDS), p=self.weights)], rng)
                if turn is not None:
                    owners.append(b)
                    language = LANGUAGES[rng.integers(2)]
                    turns.append(self.encode(turn, language, language if rng.random() < 0.4 else "zh"))
        return torch.tensor(owners), turns

    def encode(self, turn, language, wrapper):
        """`wrapper`: English questions also stand in the release's default form, 问：…答："""
        ids, start = self.tokenizer.prompt(turn.question(language), wrapper, ROWS)
        return ids, start, self.tokenizer.encode(turn.answer[language]) + [self.tokenizer.ids["eos_token_id"]]


def layout(prompt_length: int, answer_length: int) -> np.ndarray:
    """(position, block position): <sop> and the answer stay at gMASK's position and count blocks from 1."""
    context = prompt_length - 1
    position = np.minimum(np.arange(prompt_length + answer_length), context - 1)
    block = np.maximum(np.arange(prompt_length + answer_length) - context + 1, 0)
    return np.stack((position, block), axis=1)


def pack(turns, pad):
    """Right-padded ids, positions, contexts and labels (-100 = not an answer token)."""
    longest = max(len(ids) + len(answer) for ids, _, answer in turns) - 1
    ids = torch.full((len(turns), longest), pad)
    labels, positions = torch.full_like(ids, -100), torch.zeros(len(turns), longest, 2)
    for b, (prompt, _, answer) in enumerate(turns):
        row = torch.tensor(prompt + answer)
        ids[b, :len(row) - 1], labels[b, len(prompt) - 1:len(row) - 1] = row[:-1], torch.tensor(answer)
        positions[b, :len(row) - 1] = torch.from_numpy(layout(len(prompt), len(answer) - 1))
    return ids, positions, torch.tensor([len(p) - 1 for p, _, _ in turns]), labels


def splice(decoder, ids, start, rows):
    embedded = decoder.word_embeddings(ids)
    return torch.cat((embedded[:, :start], rows.to(embedded.dtype), embedded[:, start + ROWS:]), dim=1)


def answer_loss(decoder, turns, rows, pad, drop=False):
    """Cross-entropy of the answer tokens. `drop` leaves the spare rows out (positions kept): far shorter sequences."""
    ids, positions, context, labels = pack(turns, pad)
    start = turns[0][1]
    x = splice(decoder, ids, start, rows)
    if drop:
        keep = torch.cat((torch.arange(start + 9), torch.arange(start + ROWS, ids.shape[1])))
        x, positions, labels, context = x[:, keep], positions[:, keep], labels[:, keep], context - (ROWS - 9)
    hidden = decoder(x, positions, context)
    return F.cross_entropy(decoder.lm_head(hidden[labels >= 0]).float(), labels[labels >= 0])


# ----------------------------------------------------------------------------------------------------------- stages

class Tower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tower, self.heads = make_tower(config), PatchHeads(config["eva_config"]["hidden_size"])
        self.codes = codebook(config["hidden_size"])

    def loss(self, step, args):
        rng = stream("tower", step)
        scenes = draw_scenes(rng, args.batch)
        objects = table(scenes)
        owner = patch_owner(objects)
        patches, keep = draw_patches(scenes, rng, owner, kept(step, args))
        owner = owner if keep is None else np.take_along_axis(owner, keep, axis=1)
        with torch.autocast("cpu", torch.bfloat16):
            rows, tokens = see(self.tower, patches, None if keep is None else torch.from_numpy(keep))
        loss, right = row_loss(rows.float(), row_labels(objects), self.codes)
        patch = self.heads(tokens, objects, owner, keep)
        return loss + patch, {"rows": loss.item(), "patch": patch.item(), **right}


class Language(nn.Module):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.decoder, self.questions, self.pad = Decoder(config), Questions(tokenizer), config["pad_token_id"]
        self.codes = codebook(config["hidden_size"])

    def loss(self, step, args):
        rng = stream("language", step)
        scenes = draw_scenes(rng, args.batch)
        labels = row_labels(table(scenes))
        rows = doubtful(row_features(labels), labels, rng.uniform(0.5, 4.0)) @ self.codes
        rows = rows + args.blur * torch.from_numpy(rng.standard_normal(rows.shape, np.float32))
        owners, turns = self.questions.sample(scenes, args.per_scene, rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(self.decoder, turns, rows[owners], self.pad, drop=step < args.steps * args.partial)
        return loss, {"answer": loss.item()}


class Read(nn.Module):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.decoder, self.eye = Decoder(config), [make_tower(config)]      # in a list: not part of this stage's state
        self.questions, self.pad = Questions(tokenizer), config["pad_token_id"]

    def loss(self, step, args):
        if step % 50 == 0 or not hasattr(self, "awake"):
            load_part(self.eye[0], "tower", args.out / "tower.pt")
            self.awake = True
        rng = stream("read", step)
        scenes = draw_scenes(rng, args.batch)
        patches, _ = draw_patches(scenes, rng, None, 256)
        owners, turns = self.questions.sample(scenes, args.per_scene, rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                rows, _ = see(self.eye[0], patches)
            loss = answer_loss(self.decoder, turns, rows.float()[owners], self.pad)
        return loss, {"answer": loss.item()}


class Join(nn.Module):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.tower, self.decoder = make_tower(config), Decoder(config)
        self.codes = codebook(config["hidden_size"])
        self.questions, self.pad = Questions(tokenizer), config["pad_token_id"]

    def loss(self, step, args):
        rng = stream("join", step)
        scenes = draw_scenes(rng, args.batch)
        objects = table(scenes)
        patches, _ = draw_patches(scenes, rng, None, 256)
        owners, turns = self.questions.sample(scenes, args.per_scene, rng)
        with torch.autocast("cpu", torch.bfloat16):
            rows, _ = see(self.tower, patches)
            answer = answer_loss(self.decoder, turns, rows[owners], self.pad)
        code, right = row_loss(rows.float(), row_labels(objects), self.codes)
        return answer + 0.3 * code, {"answer": answer.item(), "rows": code.item(), **right}


def make_stage(name, config, tokenizer):
    torch.manual_seed(SEED + STAGES[name])
    return Tower(config) if name == "tower" else {"language": Language, "read": Read, "join": Join}[name](config, tokenizer)


def optimizers(module, rate):
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inside, rest = [], []
    for name, p in module.named_parameters():
        matrix = p.dim() == 2 and ("blocks" in name or "layers" in name)
        (inside if matrix else rest).append(p)
    return [torch.optim.Muon(inside, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def rate_at(step, args):
    """Linear warm-up over 100 steps, flat, then linear to zero over the last `decay` part."""
    return min((step + 1) / 100, (args.steps - step) / max(args.steps * args.decay, 1), 1.0) * args.rate


def load_part(module, part, path):
    """The weights that the stage stored in `path` keeps under `part`."""
    saved = torch.load(path, weights_only=True)["model"]
    module.load_state_dict({k.removeprefix(part + "."): v for k, v in saved.items() if k.startswith(part + ".")})


def begin(name, module, out):
    """Fresh weights for the first two stages, the earlier stages' for the others."""
    if name in ("read", "join"):
        newest = next(n for n in ("read", "language") if (out / f"{n}.pt").exists())
        load_part(module.decoder, "decoder", out / f"{newest}.pt")
    if name == "join":
        load_part(module.tower, "tower", out / "tower.pt")


def train(name, args, config, tokenizer, progress):
    module, path = make_stage(name, config, tokenizer), args.out / f"{name}.pt"
    tools, step = optimizers(module, args.rate), 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["model"])
        for tool, state in zip(tools, saved["tools"]):
            tool.load_state_dict(state)
        step = saved["step"]
    else:
        begin(name, module, args.out)
    bar, started, log = progress.add_task(name, total=args.steps, completed=step), time.time(), Log(args.out / f"{name}.log")
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
    """Over the processes of torchrun: two processes with a thread each are faster than one with two."""
    if WORLD > 1:
        gradients = [p.grad for p in module.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, mean in zip(gradients, (flat / WORLD).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


def keep(path, module, tools, step):
    """Written aside first: a killed run leaves the previous state whole."""
    aside = path.with_suffix(".tmp")
    torch.save({"model": module.state_dict(), "tools": [t.state_dict() for t in tools], "step": step}, aside)
    os.replace(aside, path)


class Log:
    """Mean of the numbers since the last line, appended to a text file."""

    def __init__(self, path):
        self.path, self.rows = path, []

    def add(self, numbers):
        self.rows.append(numbers)

    def write(self, step, rate, seconds):
        means = {k: float(np.mean([r[k] for r in self.rows])) for k in self.rows[0]}
        with self.path.open("a") as file:
            file.write(f"{step} {seconds:.0f}s lr={rate:.1e} " + " ".join(f"{k}={v:.3f}" for k, v in means.items()) + "\n")
        self.rows = []


def save(out, folder, config, tokenizer):
    """From `join` if it exists, else from the separate stages."""
    module = make_stage("join", config, tokenizer)
    if (out / "join.pt").exists():
        module.load_state_dict(torch.load(out / "join.pt", weights_only=True)["model"])
    else:
        begin("join", module, out)
    folder.mkdir(parents=True, exist_ok=True)
    save_release(folder, config, module.tower, module.decoder)
    build(folder)


DEFAULTS = {"tower": dict(steps=5000, batch=32, rate=2e-3, decay=0.4, partial=0.93),
            "language": dict(steps=3000, batch=16, rate=2e-3, decay=0.4, partial=0.9),
            "read": dict(steps=400, batch=16, rate=1e-3, decay=0.7, partial=0.0),
            "join": dict(steps=400, batch=16, rate=3e-4, decay=0.8, partial=0.0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="states of the stages, logs, and checkpoint/")
    parser.add_argument("--stage", choices=[*STAGES, "save", "all"], default="all")
    parser.add_argument("--steps", type=int, help="steps of the stage (default: as published)")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--batch", type=int, help="scenes per step")
    parser.add_argument("--keep", type=int, default=96, help="patches per picture in the first part of `tower`")
    parser.add_argument("--per-scene", type=int, default=4, help="questions per scene")
    parser.add_argument("--blur", type=float, default=0.05, help="noise on the ideal codes in `language`")
    parser.add_argument("--every", type=int, default=50, help="steps between saves and log lines")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
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
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        for name in ("tower", "language", "read", "join") if args.stage == "all" else [args.stage] if args.stage in STAGES else []:
            given = {k: getattr(args, k) for k in ("steps", "rate", "batch") if getattr(args, k) is not None}
            train(name, argparse.Namespace(**{**vars(args), **DEFAULTS[name], **given}), config, tokenizer, progress)
    if args.stage in ("save", "all") and RANK == 0:
        save(args.out, args.out / "checkpoint", config, tokenizer)


if __name__ == "__main__":
    main()

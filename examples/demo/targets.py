"""Training targets besides answers: the true scene as codes for the image rows, and as classes of patches.

Rows 0-3 should hold the objects from left to right, rows 4-7 from top to bottom, as a fixed orthonormal code of their
properties. So the decoder can learn to read scenes before the tower can see, and the tower has a target of its own.
"""

import numpy as np
import torch
from net import ROWS
from scenes import CANVAS, RADIUS
from torch import nn
from torch.nn import functional as F

PATCH = 14  # pixels
GRID = 16  # patches per side
MOST = 4  # objects in a scene
GROUPS = {
    "empty": 2,
    "color": 8,
    "shape": 4,
    "size": 3,
    "rank": 4,
}  # one-hot groups of a row, then x and y
FEATURES = sum(GROUPS.values()) + 2
SHARP = 8.0  # logit = SHARP * one-hot estimate
PATCH_HEADS = {"color": 9, "shape": 4, "size": 3, "across": 4, "down": 4}


def codebook(width: int) -> torch.Tensor:
    """Fixed orthonormal directions [FEATURES, width]."""
    generator = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(width, FEATURES, generator=generator))[0].T.contiguous()


def table(scenes) -> dict[str, np.ndarray]:
    """Objects as arrays [B, 4]; missing ones have class 0 and `there` False."""
    out = {}
    for key in ("color", "shape", "size", "x", "y"):
        out[key] = np.zeros((len(scenes), MOST), np.float32 if key in "xy" else np.int64)
    there = np.zeros((len(scenes), MOST), bool)
    for b, scene in enumerate(scenes):
        for k, thing in enumerate(scene.things):
            there[b, k] = True
            for key in out:
                out[key][b, k] = getattr(thing, key)
    across = _ranks(out["x"], there)
    down = _ranks(out["y"], there)
    return {**out, "there": there, "across": across, "down": down}


def _ranks(values, there):
    """Rank of each object in its scene by `values`; missing ones come last."""
    order = np.argsort(np.where(there, values, 1e9), axis=1)
    return np.argsort(order, axis=1)


def row_labels(objects) -> dict[str, torch.Tensor]:
    """Classes [B, 8] of the rows: left to right, then top to bottom; `rank` is the place in the other order."""
    parts = []
    for order, other in (("across", "down"), ("down", "across")):
        index = np.argsort(objects[order], axis=1)
        pick = {k: np.take_along_axis(v, index, axis=1) for k, v in objects.items()}
        parts.append(
            {
                "empty": (~pick["there"]).astype(np.int64),
                "color": pick["color"],
                "shape": pick["shape"],
                "size": pick["size"],
                "rank": pick[other],
                "x": pick["x"],
                "y": pick["y"],
            }
        )
    return {k: torch.from_numpy(np.concatenate([p[k] for p in parts], axis=1)) for k in parts[0]}


def row_features(labels) -> torch.Tensor:
    """The ideal feature vectors [B, 32, FEATURES]; spare rows say `empty`."""
    there = (1 - labels["empty"])[..., None].float()
    hot = [F.one_hot(labels["empty"], 2).float()]
    hot += [F.one_hot(labels[k], n).float() * there for k, n in list(GROUPS.items())[1:]]
    hot += [(labels[axis][..., None] / (CANVAS / 2) - 1) * there for axis in "xy"]
    spare = torch.zeros(len(there), ROWS - 2 * MOST, FEATURES)
    spare[..., 1] = 1
    return torch.cat((torch.cat(hot, dim=-1), spare), dim=1)


def doubtful(features, labels, width):
    """Ideal features as a tower gives them where two neighbours are hardly apart: a blend of both rows."""
    out = features.clone()
    place = torch.cat((labels["x"][:, :MOST], labels["y"][:, MOST:]), dim=1)
    both = (labels["empty"][:, :-1] == 0) & (labels["empty"][:, 1:] == 0)
    share = 0.5 * torch.exp(-(place[:, 1:] - place[:, :-1]).abs() / width) * both
    for k in (0, 1, 2, 4, 5, 6):
        a = out[:, k].clone()
        b = out[:, k + 1].clone()
        w = share[:, k, None]
        out[:, k] = a + w * (b - a)
        out[:, k + 1] = b + w * (a - b)
    return out


def row_loss(rows, labels, codes):
    """Squared error to the codes, plus cross-entropy of every group read along its directions -> (loss, accuracy)."""
    ideal = row_features(labels)
    loss = (rows - ideal @ codes).square().sum(-1).mean()
    read = rows[:, : 2 * MOST] @ codes.T
    scores = (read * SHARP)[..., :-2].split(list(GROUPS.values()), dim=-1)
    there = labels["empty"] == 0
    right = {}
    loss = loss + 5 * F.l1_loss(read[there][:, -2:], ideal[:, : 2 * MOST][there][:, -2:])
    for (group, _), score in zip(GROUPS.items(), scores):
        use = there if group != "empty" else torch.ones_like(there)
        loss = loss + F.cross_entropy(score[use], labels[group][use])
        right[group] = (score.argmax(-1) == labels[group])[use].float().mean().item()
    return loss, right


def patch_owner(objects) -> np.ndarray:
    """Index of the object whose box covers at least a quarter of the patch, -1 for paper: [B, 256]."""
    edge = np.arange(GRID) * PATCH
    radius = np.array(RADIUS)[objects["size"]]

    def covered(centre):
        low = (centre - radius)[..., None]
        high = (centre + radius)[..., None]
        return np.clip(np.minimum(high, edge + PATCH) - np.maximum(low, edge), 0, None)

    heights = covered(objects["y"])[..., :, None]
    widths = covered(objects["x"])[..., None, :]
    area = heights * widths * objects["there"][..., None, None]
    area = area.reshape(*area.shape[:2], -1)
    return np.where(area.max(1) >= PATCH * PATCH / 4, area.argmax(1), -1)


class PairHeads(nn.Module):
    """Reads the ranks of a relation question's objects in the decoder's inner layers; discarded after training.

    At the two names (before the last two layers) it reads the object's own ranks, at <sop> (before the last layer) all
    four. Without these heads the decoder answers relations by chance for very long: yes and no carry little information.
    """

    def __init__(self, width: int):
        super().__init__()
        self.early = nn.Linear(width, 2 * MOST)
        self.late = nn.Linear(width, 2 * MOST)
        self.answer = nn.Linear(width, 4 * MOST)

    def forward(self, taps, objects, pairs):
        turns, scenes, *both = np.array(pairs).T
        columns = []
        for index in both:
            columns += [objects["across"][scenes, index], objects["down"][scenes, index]]
        ranks = np.stack(columns, axis=1)
        early, late = (F.layer_norm(tap[turns].float(), tap.shape[-1:]) for tap in taps[-3:-1])
        scores = (self.early(early[:, 1:]), self.late(late[:, 1:]), self.answer(late[:, 0]))
        labels = torch.from_numpy(ranks.ravel())
        return sum(F.cross_entropy(score.reshape(-1, MOST), labels) for score in scores) / 3


class PatchHeads(nn.Module):
    """Reads the classes and the centre of the object under each patch; discarded after training."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, sum(PATCH_HEADS.values()) + 2)

    def forward(self, tokens, objects, owner, keep):
        out = self.linear(tokens.float())
        *scores, centre = out.split([*PATCH_HEADS.values(), 2], dim=-1)
        on = owner >= 0
        pick = {
            k: torch.from_numpy(np.take_along_axis(objects[k], np.maximum(owner, 0), axis=1))
            for k in ("color", "shape", "size", "across", "down", "x", "y")
        }
        mask = torch.from_numpy(on)
        loss = F.cross_entropy(
            scores[0].flatten(0, 1), torch.where(mask, pick["color"] + 1, 0).flatten()
        )
        for (head, _), score in list(zip(PATCH_HEADS.items(), scores))[1:]:
            loss = loss + F.cross_entropy(score[mask], pick[head][mask])
        where = torch.stack((pick["x"], pick["y"]), -1) / (CANVAS / 2) - 1
        return loss + 10 * F.l1_loss(centre[mask], where[mask])  # order hangs on exact centres

"""One optimisation step of CT, CD, ECT and EDM, as the public training loops take it (mode a) and tuned (b, c).

What a row is made of comes from FOLDER/ROW.json, which this project writes; the batch, the noise and the noise levels of
the check from FOLDER/ROW.safetensors. Timed steps draw their own noise and levels, as training does.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from weights import build, classes


class TrainRow:
    def __init__(self, folder, row, mode):
        self.folder, self.mode = Path(folder), mode
        self.work = work = json.loads((self.folder / f"{row}.json").read_text())
        self.example = {k: v.to(mode.device) for k, v in load_file(self.folder / f"{row}.safetensors").items()}
        self.images, self.batch = self.example["images"], self.example["images"].shape[0]
        self.labels = classes(work, self.batch, mode.device)
        self.recipe, self.boundary = work["recipe"], work["consistency"]
        self.net, self.student = build(work, mode, self.boundary, work["weights"], folder, trains=True)
        self.target_net = self.target = self.teacher = None
        if work["mu"] is not None:
            self.target_net, self.target = build(work, mode, self.boundary, work["weights"], folder)
        if work["teacher"] is not None:
            _, self.teacher = build(work, mode, False, work["teacher"], folder)
        self.params = [p for p in self.net.parameters()]
        self.averages = [[p.detach().clone() for p in self.params] for _ in work["emas"]]
        self.optimizer = optimizer(self.params, work, mode)
        # EDM's loop and ECT's, which is made of it; else that of Consistency Models.
        self.is_edm = work["replace_non_finite"]
        self.items = self.batch

    # -- levels ------------------------------------------------------------------------------------------------------

    def draw(self):
        """Noise and noise levels of a step: σ, σ′ (None for diffusion) and weight, each [B]."""
        noise, device = torch.randn_like(self.images), self.mode.device
        pairs, levels = self.recipe["pairs"], self.work["precond"]
        if pairs["kind"] == "grid":
            n, rho = self.work["num_scales"], pairs["rho"]
            index = torch.randint(0, n - 1, (self.batch,), device=device)
            high, low = levels["sigma_max"] ** (1 / rho), levels["sigma_min"] ** (1 / rho)
            sigma = (high + index / (n - 1) * (low - high)) ** rho
            nearer = (high + (index + 1) / (n - 1) * (low - high)) ** rho
        else:
            rule = pairs["sigma"]
            sigma = (torch.randn(self.batch, device=device) * rule["std"] + rule["mean"]).exp()
            nearer = None
            if pairs["kind"] == "continuous":
                adjust = pairs["map"]["adjust"]
                factor = 1 + adjust.get("k", 0) * torch.sigmoid(-adjust.get("b", 0) * sigma)
                ratio = 1 - factor / pairs["map"]["q"] ** (self.work["stage"] + 1)
                nearer = (sigma * ratio).clamp(min=0)
                nearer = torch.where(nearer < levels["sigma_min"], torch.zeros_like(nearer), nearer)
        return noise, sigma, nearer, self.weight(sigma, nearer)

    def weight(self, sigma, nearer):
        rule = self.recipe["weighting"]
        if rule == "uniform":
            return torch.ones_like(sigma)
        if rule == "inverse_step":
            return 1 / (sigma - nearer)
        if rule == "karras":
            return 1 / sigma**2 + 1 / self.work["precond"]["sigma_data"] ** 2
        raise ValueError(f"weighting {rule}")

    def given(self):
        noise, sigma, nearer, weight = (self.example[k] for k in ("noise", "sigma", "next", "weight"))
        return noise, sigma.float(), nearer.float(), weight.float()

    # -- loss --------------------------------------------------------------------------------------------------------

    def loss(self, noise, sigma, nearer, weight):
        column = lambda v: v.reshape(-1, 1, 1, 1)
        noisy = self.images + noise * column(sigma)
        # Student and target share their dropout mask, as in the references.
        state = torch.get_rng_state()
        estimate = self.student(noisy, sigma, self.labels)
        torch.set_rng_state(state)
        wanted = self.wanted(noise, noisy, sigma, nearer)
        return (self.distance(estimate, wanted) * weight).mean()

    @torch.no_grad()
    def wanted(self, noise, noisy, sigma, nearer):
        if self.recipe["pairs"]["kind"] == "denoise":
            return self.images
        column = lambda v: v.reshape(-1, 1, 1, 1)
        if self.teacher is not None:
            step = column(nearer - sigma)
            slope = (noisy - self.teacher(noisy, sigma, self.labels)) / column(sigma)
            there = noisy + slope * step
            slope2 = (there - self.teacher(there, nearer, self.labels)) / column(nearer)
            there = noisy + (slope + slope2) * step / 2
        else:
            there = self.images + noise * column(nearer)
        known = torch.where(nearer > 0, nearer, sigma)
        estimate = (self.target or self.student)(there, known, self.labels)
        return torch.where(column(nearer > 0), estimate, self.images)

    def distance(self, estimate, wanted):
        difference = (estimate - wanted).flatten(1)
        metric = self.work["metric"]
        if metric["kind"] == "l2":
            return difference.square().mean(1)
        if metric["kind"] == "squared_norm":
            return difference.square().sum(1)
        if metric["kind"] == "pseudo_huber":
            return (difference.square().sum(1) + metric["c"] ** 2).sqrt() - metric["c"]
        raise ValueError(f"metric {metric['kind']}")

    # -- step --------------------------------------------------------------------------------------------------------

    def step(self, given=None):
        loss = self.loss(*(given or self.draw()))
        loss.backward()
        self.update()
        return loss

    def update(self):
        """What follows the backward pass: gradients looked at, optimiser, target, averages, gradients dropped."""
        self.norm = self.look_at_gradients()
        self.optimizer.step()
        with torch.no_grad():
            if self.target_net is not None:
                follow(list(self.target_net.parameters()), self.params, self.work["mu"], self.mode)
            for average, beta in zip(self.averages, self.work["emas"]):
                follow(average, self.params, beta, self.mode, copies=self.is_edm)
        self.optimizer.zero_grad(set_to_none=True)

    def look_at_gradients(self):
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.mode.tuned:
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()
        if self.is_edm:
            for grad in grads:
                torch.nan_to_num(grad, nan=0, posinf=1e5, neginf=-1e5, out=grad)
            return None
        # Consistency models' loop logs the norm, one parameter after the other.
        return sum(torch.linalg.vector_norm(grad).item() ** 2 for grad in grads) ** 0.5

    def run(self, count):
        for _ in range(count):
            loss = self.step()
        loss.item()
        self.mode.synchronize()

    def check(self):
        before = copy.deepcopy([p.detach() for p in self.params])
        loss = self.loss(*self.given())
        loss.backward()
        squares = [p.grad.double().square().sum() for p in self.params if p.grad is not None]
        norm = torch.stack(squares).sum().sqrt()
        self.update()
        moved = [(p.detach().double() - q.double()).square().sum() for p, q in zip(self.params, before)]
        return {
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "moved": torch.stack(moved).sum().sqrt().item(),
        }


def optimizer(params, work, mode):
    rule = work["optimizer"]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[rule["kind"]]
    how = {}
    if mode.tuned:
        how = {"foreach": True} if rule["kind"] == "radam" else {"fused": True}
    return kind(
        params, lr=work["lr"], betas=(rule["beta1"], rule["beta2"]), eps=rule["eps"],
        weight_decay=rule["weight_decay"], **how)


def follow(average, params, beta, mode, copies=False):
    """θ⁻ ← βθ⁻ + (1 − β)θ; with `copies` as EDM's loop writes it."""
    if mode.tuned:
        torch._foreach_lerp_(average, params, 1 - beta)
        return
    for kept, new in zip(average, params):
        if copies:
            kept.copy_(new.detach().lerp(kept, beta))
        else:
            kept.detach().mul_(beta).add_(new, alpha=1 - beta)


# As many as this project's side makes before it says how far weights and averages moved.
CHECKED_UPDATES = 40


class UpdateRow(TrainRow):
    """Optimiser, averages and clearing of gradients alone."""

    def __init__(self, folder, row, mode):
        super().__init__(folder, "ct", mode)
        self.items = 1
        # They stay as they are: gradients that follow the weights have led these to 0 after some hundred updates, and
        # moments that are no longer normal numbers then take a multiple of the time.
        self.gradients = [p.detach() * 0.1 + 1e-3 for p in self.params]

    def fill(self):
        for p, gradient in zip(self.params, self.gradients):
            p.grad = gradient.clone()

    def timed(self, count, clock):
        """The gradients are made outside of the clock."""
        seconds = 0.0
        for _ in range(count):
            self.fill()
            begin = clock()
            self.update()
            self.mode.synchronize()
            seconds += clock() - begin
        return seconds

    def check(self):
        before = [p.detach().double() for p in self.params]
        # Few updates move an average by so little that its rounding shows.
        for _ in range(CHECKED_UPDATES):
            self.fill()
            self.update()
        difference = lambda others: sum((a.double() - b).square().sum() for a, b in zip(others, before)).sqrt().item()
        return {"moved": difference([p.detach() for p in self.params]), "average": difference(self.averages[0])}

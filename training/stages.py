"""What one training step is: `PretrainStage` on real videos, `SelfForcingStage` on the generator's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_video_sf import Rollout, SelfForcingEngine, Text
from machine.runtime import Runtime, require_compiler
from method.diagnostics import STEP_COLUMNS, exit_columns
from method.settings import PretrainConfig, SelfForcingConfig, TrainingConfig
from network.text_encoder import NULL_PROMPT, TextEncoder
from network.weights import exponential_decay, update_average
from tiny_causal_wan import PromptContext, TinyCausalWanModel
from training.checkpoint import CheckpointError
from training.config import Config
from training.data import draw_num_frames, draw_switch, draw_window_start, next_in_batch, open_data
from training.distributed import ONE_PROCESS, Processes, mean_figures
from training.objectives import bidirectional_loss, block_causal_loss, drop_prompts, teacher_forcing_loss
from training.optimizers import MUON_RATE, build_muon, self_forcing_optimizers, split_matrices
from training.resumable import Sampler, Stage, many_step_samplers
from training.sharding import shard_blocks, whole
from training.starting_networks import check_is_bidirectional, check_same_start, load_start, load_teacher


def rate_factor(config: TrainingConfig, step: int, warmup_steps: int = 0) -> float:
    """Factor of the learning rates at this step: linear warm-up, constant, linear decay over the last `decay_fraction` of the run."""
    decay_steps = max(config.decay_fraction * config.num_steps, 1)
    return min((step + 1) / max(warmup_steps, 1), (config.num_steps - step) / decay_steps, 1.0)


class PretrainStage(Stage):
    """Training on real videos (see `objectives`): a share of the steps bidirectional, the others block-causal, or all causal."""

    config: PretrainConfig
    columns = ("loss_bidirectional", "loss_causal", "gradient_norm", "lr_factor")
    counter = "num_videos_seen"

    def __init__(self, config: Config, runtime: Runtime, random: torch.Generator, processes: Processes = ONE_PROCESS):
        super().__init__(config, runtime, random, processes)
        if self.config.clip_steps:
            self.parts.check_divides("training.clip_batch_size", self.config.clip_batch_size)
        self.data = open_data(config.dataset, "train", self.config.digit_variation)
        self.model = TinyCausalWanModel(config.model).to(runtime.device)
        self.text_encoder = TextEncoder(config.text).to(runtime.device)
        if self.config.pretrained_checkpoint is not None:
            start = load_teacher(Path(self.config.pretrained_checkpoint), config, runtime.device)
            self.model.load_state_dict(start.generator.state_dict())
            self.text_encoder.load_state_dict(start.text_encoder.state_dict())
            self.text_encoder.requires_grad_(False)  # networks that start from one teacher keep one text encoder
            self.continue_from(start)
        if self.config.activation_checkpointing:
            self.model.recompute_activations()
        self.live = nn.ModuleDict({"generator": self.model, "text_encoder": self.text_encoder})
        self.average = copy.deepcopy(self.live).requires_grad_(False).eval()
        if self.config.sharding == "fsdp2":
            shard_blocks((self.model, self.average["generator"]), processes.count, runtime.device)
        if self.config.compile:
            require_compiler("training.compile", runtime.device)
            for block in self.model.blocks:
                block.compile(dynamic=False)
        matrices, others = split_matrices(self.live)
        self.optimizers["muon"] = build_muon(matrices, self.config.muon_lr, self.config.weight_decay)
        self.optimizers["adamw"] = torch.optim.AdamW(others, lr=self.config.lr, weight_decay=self.config.weight_decay)

    def train_step(self, step: int) -> dict[str, float]:
        config = self.config
        num_frames, batch_size = draw_num_frames(config, self.random.generator), config.batch_size
        if step < config.clip_steps:
            num_frames, batch_size = config.clip_frames, config.clip_batch_size
        indices = self.next_indices(batch_size)
        losses = []
        for part in self.parts.of(batch_size, self.random):
            batch = self.data.sample(self.seed, indices[part], num_frames)
            prompts = drop_prompts(batch.captions, config.prompt_dropout, self.random)
            x_0 = batch.video.to(self.runtime.device)
            with self.runtime.autocast():
                prompt = self.model.encode_prompt(*self.text_encoder.encode(prompts))
                kind, loss = self._loss(step, x_0, prompt, indices, part)
            self.parts.backward(loss)
            losses.append({kind: loss.item()})
        factor = rate_factor(config, step, config.warmup_steps)
        self.set_rates({"muon": factor * config.muon_lr, "adamw": factor * config.lr})
        norm = self.step_optimizers(self.live)
        update_average(self.average, self.live, exponential_decay(config.ema_decay, step))
        return {**mean_figures(losses), "gradient_norm": norm, "lr_factor": factor}

    def _loss(self, step: int, x_0: Tensor, prompt: PromptContext, indices: Sequence[int], part: slice) -> tuple[str, Tensor]:
        """Name and value of the loss on one part of the batch with these indices."""
        config = self.config
        inputs = self.model, x_0, prompt, config, self.random
        if config.objective == "teacher_forcing":
            return "loss_causal", teacher_forcing_loss(*inputs)
        share = config.bidirectional_share  # of the steps, evenly spread: .5 is every even step
        if config.objective == "mixed" and math.ceil((step + 1) * share) > math.ceil(step * share):
            return "loss_bidirectional", bidirectional_loss(*inputs)
        x_before = None
        if config.switch_probability > 0:  # a switch may come from the digit of the next video
            x_before = self.data.before(self.seed, indices[part], next_in_batch(indices)[part], x_0.shape[1]).to(x_0.device)
        return "loss_causal", block_causal_loss(*inputs, x_before)

    def shown(self) -> dict[str, Sampler]:
        """The averaged network, as the teacher that it becomes or as the causal network that it is."""
        is_causal = self.config.objective != "mixed"
        networks = self.average["generator"], self.average["text_encoder"]
        return many_step_samplers("causal" if is_causal else "teacher", *networks, self.config, is_causal)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.model, "text_encoder": self.text_encoder}

    def modules(self) -> dict[str, nn.Module]:
        return {
            "generator_state_dict": self.model, "generator_ema_state_dict": self.average["generator"],
            "text_encoder_state_dict": self.average["text_encoder"], "text_encoder_live_state_dict": self.text_encoder,
        }


class SelfForcingStage(Stage):
    """Self-Forcing, or a distillation on real videos: a critic update every step, a generator update every few."""

    config: SelfForcingConfig

    def __init__(self, config: Config, runtime: Runtime, random: torch.Generator, processes: Processes = ONE_PROCESS):
        super().__init__(config, runtime, random, processes)
        self.columns = (
            "loss_generator", "loss_critic", "dmd_gradient_norm", "score_distance", "logit_distance", "gradient_norm_generator",
            "gradient_norm_critic", "exit_step", "num_frames", *(() if self.config.rollout_frames is None else ("first_frame",)),
            *STEP_COLUMNS, *exit_columns(self.config.denoising_steps),
        )
        self.data = open_data(config.dataset)  # of which only the prompts are used, unless config.uses_videos
        loaded = load_teacher(Path(self.config.pretrained_checkpoint), config, runtime.device)
        check_is_bidirectional(self.config.pretrained_checkpoint, loaded.config)
        self.text_encoder, start = loaded.text_encoder, None
        self.continue_from(loaded)
        if self.config.generator_checkpoint is not None:
            start = load_start(Path(self.config.generator_checkpoint), config, loaded, runtime.device)
            self.continue_from(start)
        self.engine = SelfForcingEngine(self.config, loaded.generator, random, None if start is None else start.generator)
        self.random = self.engine.random  # both draw for the same part of a batch
        if self.config.sharding == "fsdp2":
            shard_blocks(self.engine.networks(), processes.count, runtime.device)
        for name, network in self.networks().items():
            self.optimizers |= self_forcing_optimizers(name, network, self.config)
        self.num_generator_updates = 0

    def train_step(self, step: int) -> dict[str, float]:
        config, random = self.config, self.random.generator
        num_frames = draw_num_frames(config, random)
        first_frame = draw_window_start(config, num_frames, random)
        return self.train_on_window(step, num_frames, first_frame, switches=first_frame > 0 and draw_switch(config, random))

    def train_on_window(self, step: int, num_frames: int, first_frame: int, switches: bool = False) -> dict[str, float]:
        """A step on num_frames frames of the rollouts, from frame first_frame on; switches: there the prompt changes."""
        config, engine = self.config, self.engine
        is_generator_turn = step >= config.critic_warmup_steps and (step + 1) % config.dfake_gen_update_ratio == 0
        indices = self.next_indices(config.batch_size)
        figures = {"num_frames": num_frames} | ({} if config.rollout_frames is None else {"first_frame": first_frame})
        # The critic's rate does not fall: it must keep up with the generator.
        rates = {"generator": rate_factor(config, step) * config.lr, "critic": config.critic_lr}
        self.set_rates(rates | {f"{name}_muon": MUON_RATE * rate for name, rate in rates.items()})
        # 1. The generator makes videos, and on its turn learns from its loss on them.
        made, seen = [], []  # by part: what the critic learns from, and the figures of the generator's loss
        for part in self.parts.of(config.batch_size, self.random):
            earlier = next_in_batch(indices)[part] if switches else None
            rollout, text, critic_text, x_real = self._make_videos(indices[part], num_frames, first_frame, is_generator_turn, earlier)
            figures.setdefault("exit_step", rollout.exit_steps[0])  # of the batch's first video if each has its own
            if is_generator_turn:
                null_text = self._encode([NULL_PROMPT] * len(rollout.scored))
                with self.runtime.autocast():
                    loss, of_loss = engine.generator_loss(rollout.scored, text, null_text, x_real, rollout.frame_exits, critic_text)
                self.parts.backward(loss)
                seen.append({"loss_generator": loss.item(), **of_loss})
            made.append((rollout.finished, critic_text, x_real))
        if is_generator_turn:
            figures |= {"gradient_norm_generator": self.step_optimizers(engine.generator, "generator"), **mean_figures(seen)}
        # 2. The critic learns from the same videos.
        losses = []
        for _, (finished, text, x_real) in zip(self.parts.of(config.batch_size, self.random), made, strict=True):
            with self.runtime.autocast():
                loss = engine.critic_loss(finished, text, x_real)
            self.parts.backward(loss)
            losses.append({"loss_critic": loss.item()})
        figures |= {"gradient_norm_critic": self.step_optimizers(engine.critic, "critic"), **mean_figures(losses)}
        # 3. The averages follow.
        engine.update_averages(step, self.num_generator_updates if is_generator_turn else None)
        self.num_generator_updates += is_generator_turn
        return figures

    def _make_videos(
        self, indices: Sequence[int], num_frames: int, first_frame: int, with_gradient: bool, earlier: Sequence[int] | None = None
    ) -> tuple[Rollout, Text, Text, Tensor | None]:
        """The generator's videos of these prompts, the texts that teacher and critic get with them, and the real videos if the training
        uses any. earlier: the prompts before a switch, if there is one. After it the critic gets both prompts, the earlier embeddings with
        the opposite sign: it expects every trace of the earlier prompt, the teacher none."""
        x_real = None
        if self.config.uses_videos:
            x_real = self.data.sample(self.seed, indices, num_frames).video.to(self.runtime.device)
        text = self._encode(self.data.captions(self.seed, indices))
        earlier_text = None if earlier is None else self._encode(self.data.captions(self.seed, earlier))
        with self.runtime.autocast():
            turn = self.num_generator_updates
            rollout = self.engine.make_videos(text, num_frames, with_gradient, x_real, first_frame, turn, earlier_text)
        if earlier_text is not None:
            (embeddings, mask), (earlier_embeddings, earlier_mask) = text, earlier_text
            both = torch.cat([embeddings, -earlier_embeddings], dim=1), torch.cat([mask, earlier_mask], dim=1)
            return rollout, text, both, x_real
        first_scored = first_frame + max(num_frames - self.config.gradient_frames, 0)
        if first_scored > 0 and self.config.loss != "gan":  # a caption's direction is that of the first frames, which are not scored
            text = self._encode(self.data.captions_of_any_stretch(self.seed, indices))
        return rollout, text, text, x_real

    def _encode(self, prompts: list[str]) -> Text:
        """Embeddings and mask, without gradient: the text encoder is frozen."""
        with torch.no_grad(), self.runtime.autocast():
            return self.text_encoder.encode(prompts)

    def shown(self) -> dict[str, Sampler]:
        """The averaged student beside its teacher."""
        samplers = many_step_samplers("teacher", self.engine.real_score, self.text_encoder, self.config)
        student = Sampler(self.engine.generator_average, self.text_encoder, self.engine.plan)
        return samplers | {f"student, {len(student.plan.times)} steps": student}

    def live(self) -> Sampler:
        """The generator itself, not its average: a fault shows here first."""
        return Sampler(self.engine.generator, self.text_encoder, self.engine.plan)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.engine.generator, "critic": self.engine.critic}

    def modules(self) -> dict[str, nn.Module]:
        return {
            "generator_state_dict": self.engine.generator, "generator_ema_state_dict": self.engine.generator_average,
            "critic_state_dict": self.engine.critic, "critic_ema_state_dict": self.engine.fake_average,
            "real_score_state_dict": self.engine.real_score, "text_encoder_state_dict": self.text_encoder,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"num_generator_updates": self.num_generator_updates}

    def load_state_dict(self, checkpoint: dict[str, Any], name: str) -> None:
        check_same_start(self.config, checkpoint, name, whole(self.engine.real_score.state_dict()))
        super().load_state_dict(checkpoint, name)
        self.num_generator_updates = checkpoint["num_generator_updates"]

    def load_optimizers(self, stored: dict[str, Any], name: str) -> None:
        if stored.keys() != self.optimizers.keys():
            other = "muon" if self.config.optimizer == "adamw" else "adamw"
            raise CheckpointError(f"training.optimizer is {self.config.optimizer}: {name} was trained with {other}; resume it with that")
        super().load_optimizers(stored, name)

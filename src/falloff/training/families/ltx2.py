"""LTX-2 from text, its video alone: no clip's sound is read, and none is needed where the two do not attend.

The pipeline has such a pass itself, for its guidance towards sound that fits (``isolate_modalities``). What the video
puts out there has nothing of the sound in it, so that the least of it will do: a single frame, and one token of text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from falloff.training.families.ltx import LTX, tokens_of
from falloff.training.family import Call, Sample, Text, shifted_by_size


def _text(pipe: Any, caption: str, call: Call) -> Text:
    """Through the connectors, which make the text of both; where those of words are not valid, they have registers."""
    embeds, mask, *_ = pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, max_sequence_length=call.get("max_sequence_length", 1024)
    )
    side = getattr(pipe.tokenizer, "padding_side", "left")
    video, audio, valid = pipe.connectors(embeds, mask, padding_side=side)
    return {
        "encoder_hidden_states": video,
        "encoder_attention_mask": valid,
        "audio_encoder_hidden_states": audio[:, :1],
    }


def _inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    frames, height, width = sample.size
    return {
        "hidden_states": noised,
        "timestep": 1000 * level,
        "sigma": 1000 * level,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": call.get("frame_rate", 24.0) / call.get("motion_speed", 1.0),
        "audio_hidden_states": noised.new_zeros(1, 1, pipe.transformer.config.audio_in_channels),
        "audio_num_frames": 1,
        "isolate_modalities": True,
    }


def _timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    return shifted_by_size(pipe.scheduler, tokens_of(pipe, call), steps, few=1024, least=0.95, most=2.05)


LTX2 = replace(LTX, pipelines=("LTX2Pipeline",), text=_text, inputs=_inputs, timetable=_timetable)

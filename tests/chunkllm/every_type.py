"""A tiny model of every causal model type of transformers, and whether chunk selection is right in it.

``python -m tests.chunkllm.every_type`` writes the table of docs/models.md anew.
"""

import json
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from chunkllm import ChunkAdapters, ChunkCache, ChunkError, ChunkSelection
from chunkllm.contiguous.probe import GatheringCache

SMALL = {"sinks": 1, "local": 3, "max_chunk": 4}
MATRIX = Path(__file__).parents[2] / "docs" / "chunk_models.json"
LAYERS, FULL = 4, "full_attention"
_LARGEST = 30_000_000  # parameters, of parts whose size has another name
_SIZES = {
    64: "hidden_size n_embd d_model dim embed_dim embedding_size embedding_dim emb_dim lru_width word_embed_proj_dim "
    "backbone_hidden_size input_embedding_size output_embedding_size projection_dim out_hidden_size text_hidden_size "
    "attention_hidden_size codebook_dim mamba_d_ssm output_hidden_size",
    99: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads attention_heads "
    "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts n_mamba_heads "
    "index_n_heads linear_num_heads linear_num_key_heads linear_num_value_heads swa_num_attention_heads",
    2: "num_key_value_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_k depth",
    48: "intermediate_size ffn_dim d_ff dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size feed_forward_size",
    16: "head_dim swa_head_dim dim_head d_head kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_head "
    "mamba_head_dim attention_head_size global_head_dim index_head_dim kv_lora_rank q_lora_rank o_lora_rank "
    "mamba_d_state ssm_state_size state_size linear_key_head_dim linear_value_head_dim linear_head_dim "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    32: "qk_head_dim image_size",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_shared_experts n_shared_experts",
    6: "sliding_window sliding_window_size window_size local_attention attention_window_size attention_chunk_size",
    8: "patch_size mamba_n_heads mamba_num_heads",
    128: "max_position_embeddings n_positions max_seq_len n_ctx model_max_length",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
_LINEAR = {"layer_types": ["linear_attention", FULL] * 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_HALF_MROPE = {
    "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
}
# What some configurations want beside, by model type.
_ALSO = {
    "qwen3_omni_moe_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "2/4"},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "zamba": {"num_hidden_layers": 12, "attn_layer_period": 4, "attn_layer_offset": 2},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91, "audio_start_token_id": 92},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 91, "audio_start_token_id": 92},
    "emu3_vqgan": {"base_channels": 32},
    "chameleon_vqgan": {"base_channels": 32},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass_text": {"rope_parameters": {FULL: _MROPE["rope_parameters"]}, "layer_types": [FULL] * LAYERS},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] * LAYERS},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "glm4v_moe_text": _HALF_MROPE,
    "glm4v_text": _MROPE,
    "glm5_next_text": {"num_key_value_heads": 4},
    "glm_ocr_text": _MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _LINEAR,
    "florence_vision": {"embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4},
    "hunyuan_vl_text": _MROPE,
    "inkling2_vision": {"text_hidden_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": {"base_channels": 32},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2},
    "mamba2": {"head_dim": 32},
    "ministral": {"layer_types": ["sliding_attention", FULL] * 2},
    "mistral": {"sliding_window": None},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"hidden_sizes": (16, 16, 16, 16)},
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "step3p5": {"sliding_window": 6},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
}


def types():
    """Names of all types whose models write texts token by token, those that see too."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny(config_class):
    """A configuration whose sizes are small, in its parts too."""
    default = config_class()
    given = {}
    for key, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            given[key] = tiny(type(value))
        elif key in _SIZE and type(value) is int and value > 0:
            given[key] = min(_SIZE[key], value)
        elif key in ("num_key_value_heads", "head_dim") and value is None:
            given[key] = _SIZE[key]
        elif key == "pad_token_id" and value is not None:
            given[key] = 0
        elif key == "initializer_range":
            given[key] = 0.2  # so that attention is not flat
    is_given = not isinstance(getattr(config_class, "layer_types", None), property)
    kinds = getattr(default, "layer_types", None) if is_given else None
    if kinds and FULL in kinds:
        others = [kind for kind in dict.fromkeys(kinds) if kind != FULL]
        given["layer_types"] = ([*others, FULL, *others[:1], FULL])[-LAYERS:] if others else [FULL] * LAYERS
        given["layer_types"] = [FULL] * (LAYERS - len(given["layer_types"])) + given["layer_types"]
    rope = getattr(default, "rope_parameters", None)
    if rope and "mrope_section" in rope:
        half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
        given["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return config_class(**given | _ALSO.get(config_class.model_type, {}))


def tiny_model_of(kind):
    """A model of a type, with random weights, that no token ends."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = tiny(CONFIG_MAPPING[kind])
    wanted = model_class.config_class
    if not isinstance(config, wanted):
        config = next((part for part in vars(config).values() if isinstance(part, wanted)), config)
    with torch.device("meta"):
        count = model_class._from_config(config).num_parameters()
    if count > _LARGEST:
        raise MemoryError(f"{count} parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config).eval()
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.pad_token_id, generation.eos_token_id = 0, None
    return model


def written(model, steps=5):
    """Scores [2, steps, V] of what a model writes greedily behind two texts, of which the second is padded."""
    ids = torch.arange(3, 3 + 2 * 20).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got = model.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, **options)
    return torch.stack(got.logits, 1)


def state_of(model):
    """Whatever a selection may have left behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    modules = [
        (name, module.training, set(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]
    configs = [
        module.config._attn_implementation
        for module in model.modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    return modules, configs, torch.get_rng_state().tolist()


def outcome(model):
    """Why a selection is refused for a model, or None: then it is right.

    Raises:
        AssertionError: it is neither.
    """
    try:
        plain = written(model)
    except Exception:  # noqa: BLE001  # Not for texts alone: then a selection must be refused.
        plain = None
    before, reason = state_of(model), None
    try:
        ChunkSelection(**SMALL, budget=16).attach(model).detach()
    except ChunkError as error:
        reason = str(error)
        assert "\n" not in reason
    else:
        assert plain is not None
        _assert_right(model, plain)
    assert state_of(model) == before
    assert plain is None or torch.equal(written(model), plain)
    return reason


def _assert_right(model, plain):
    """With everything selected what is written is what the model writes alone; and less can be selected."""
    scale = plain.abs().max()
    assert scale.isfinite() and plain.std() > 1e-3
    with (
        patch.object(ChunkCache, "_slots", GatheringCache._slots),
        patch.object(ChunkCache, "_due", GatheringCache._due),
        ChunkSelection(**SMALL, budget=16).attach(model) as attached,
    ):
        torch.testing.assert_close(written(model) / scale, plain / scale, atol=1e-4, rtol=0)
        assert attached.stats["selections"] == 2 * 4
    with torch.random.fork_rng():
        adapters = ChunkAdapters.for_model(model)
    with ChunkSelection(adapters, **SMALL, budget=12).attach(model) as attached:
        assert written(model).isfinite().all()
        assert attached.stats["kv_retention"] < 0.9


def main():
    """Writes the matrix that docs/models.md shows; a type that is neither right nor refused ends it."""
    found, not_built = {}, {}
    for kind in types():
        try:
            model = tiny_model_of(kind)
        except Exception as error:
            not_built[kind] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            found[kind] = outcome(model)
    held = {"transformers": transformers.__version__, "types": found, "not_built": not_built}
    MATRIX.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()

"""Tokens of vision transformers: to maps and back, positions, blocks, encoders, and queries and keys of any blocks."""

from wsss_modules.tokens.blocks import QueryKey, TransformerBlock, attention_probabilities, query_key
from wsss_modules.tokens.encoder import TokenEncoder, Tokens, token_encoder_from_vit
from wsss_modules.tokens.grid import interpolate_pos_embed, map_to_tokens, patch_grid, tokens_to_map

__all__ = [
    "QueryKey",
    "TokenEncoder",
    "Tokens",
    "TransformerBlock",
    "attention_probabilities",
    "interpolate_pos_embed",
    "map_to_tokens",
    "patch_grid",
    "query_key",
    "token_encoder_from_vit",
    "tokens_to_map",
]

"""What the video transformer is built of: attention and its masks, the KV cache, the text encoder, recomputation, averages of
weights, integer products.

The network itself is `tiny_causal_wan`. Imports `machine` alone; may be imported by all above it.
"""

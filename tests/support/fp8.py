"""Megatron's own layers as they would be with FP8 weights and inputs: what to compare with."""

import torch


def rounded(t, largest=448.0):
    """Through e4m3 and back, a scale for each row."""
    scale = t.float().abs().amax(-1, keepdim=True) / largest
    return ((t.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(t.dtype)


def _round_input(module, args):
    (t,) = args
    return (t + (rounded(t.detach()) - t.detach()),)  # the gradient goes straight through


def round_layers(model, *, attention_of=lambda layer_idx: False):
    """Dequantised weights in mcore's linear layers, and inputs rounded on the way."""
    for layer in model.decoder.layers:
        linears = [layer.mlp.linear_fc1, layer.mlp.linear_fc2]
        if attention_of(layer.layer_number - 1):
            linears += [layer.self_attention.linear_qkv, layer.self_attention.linear_proj]
        for linear in linears:
            linear.weight.data = rounded(linear.weight.data)
            linear.register_forward_pre_hook(_round_input)

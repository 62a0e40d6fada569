"""Memory, time and cost of training the published sizes on N devices, counted from the shapes."""

GPU = "H100"
GPU_MEMORY_GB = 80
GPU_FLOPS = 989e12              # in bf16, by its data sheet
DOLLARS_PER_HOUR = 2.5
MFU = 0.4                       # share of GPU_FLOPS that training reaches
TOKENS = 5.5e12                 # of the report
DAYS = 30                       # the table says how fast to train to be done in this time


def memory_plan(config, shapes, args, devices, bf16, loss_rows, program_gb=0.0):
    """The GB that training takes on each device, by purpose -> dict.

    shapes: of all parameters, by name. bf16: the dtype of activations (else fp32). loss_rows: the
    number of tokens whose logits are in memory at once. program_gb: of the process without a model.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    all_weights = sum(sizes.values())
    block_matrices = [name for name in sizes if ".layers." in name and len(shapes[name]) > 1]
    block_weights = sum(sizes[name] for name in block_matrices)
    other_weights = all_weights - block_weights
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    L, B, T = config.num_hidden_layers, args.device_batch, args.seq_len
    bytes_each = 2 if bf16 else 4
    triton = args.device == "cuda"

    # AdamW keeps two moments of each weight, Muon one for the matrices inside blocks
    moments = (1 if args.optimizer == "muon" else 2) * block_weights + 2 * other_weights
    # what autograd keeps per token of a block: norms in fp32, the inputs of all matmuls
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    block = 8 * D + bytes_each * (4 * D + keys_and_values + 4 * F)
    if not triton:                                  # eager attention keeps the attention weights
        block += bytes_each * config.num_attention_heads * T / 2
    # with checkpointed activations: the input of each block, and one block computed again
    per_token = bytes_each * D * L + block if args.checkpoint_activations else block * L
    # weights in the dtype of activations: FSDP gathers two blocks, one process casts all
    if devices > 1:
        copies = bytes_each * (2 * block_weights / L + other_weights)
    else:
        copies = bytes_each * all_weights if bf16 else 0
    logits = (bytes_each + 4) * loss_rows * V
    parts = {"weights": 4 * all_weights / devices, "gradients": 4 * all_weights / devices,
             "optimizer": 4 * moments / devices, "copies": copies,
             "activations": B * T * per_token, "loss": 2 * 4 * V * D + logits}
    if args.lora:       # frozen weights in the dtype of activations; A and B for each block matrix
        adapter = args.lora * sum(sum(shapes[name]) for name in block_matrices)
        frozen = bytes_each * all_weights
        if args.int8:                           # and a second embedding matrix, the output layer
            frozen = block_weights + bytes_each * other_weights + V * D
            logits += bytes_each * V * D
        parts.update(weights=(frozen + 4 * adapter) / devices, gradients=4 * adapter / devices,
                     optimizer=2 * 4 * adapter / devices, loss=logits,
                     copies=0 if devices == 1 else copies)
    return {"program": program_gb, **{name: size / 1e9 for name, size in parts.items()}}


def print_table(rows):
    """Print rows of strings with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)))


def print_plan(heading, memories, flops_per_token, devices):
    """Print the memory, time and cost of each size.

    memories: size -> (memory_plan(), total GB with checkpointed activations); flops_per_token:
    size -> FLOPs of a training step per token.
    """
    print(heading)
    rows = [[size, *(f"{gb:.1f}" for gb in [*parts.values(), sum(parts.values()), checkpointed])]
            for size, (parts, checkpointed) in memories.items()]
    names = list(next(iter(memories.values()))[0])
    print_table([["size", *names, "total", "checkpointed"], *rows])
    print(f"\n{TOKENS / 1e12:g}T tokens on {devices} x {GPU} ({GPU_MEMORY_GB} GB, "
          f"{GPU_FLOPS / 1e12:.0f} TFLOP/s at {MFU:.0%} MFU, ${DOLLARS_PER_HOUR} an hour)")
    rows = [["size", "GFLOP/token", "tokens/s each", f"for {DAYS} days", "days", "million $"]]
    for size, flops in flops_per_token.items():
        speed = GPU_FLOPS * MFU / flops
        days = TOKENS / (speed * devices) / 86400
        needed = TOKENS / DAYS / 86400 / devices
        dollars = days * 24 * devices * DOLLARS_PER_HOUR
        rows.append([size, f"{flops / 1e9:.1f}", f"{speed:,.0f}", f"{needed:,.0f}", f"{days:,.0f}",
                     f"{dollars / 1e6:,.2f}"])
    print_table(rows)

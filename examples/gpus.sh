#!/usr/bin/env bash
# Prints how many GPUs a program started here would see: those of nvidia-smi that CUDA_VISIBLE_DEVICES does not hide.
# The scripts source this file.

visible_gpus() {
    local there named="${CUDA_VISIBLE_DEVICES-all}"
    there="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
    if [[ "$named" != all ]]; then
        # CUDA reads the list up to the first word that names no GPU: an empty list, -1 and NoDevFiles hide all.
        named="$(tr -d ' ' <<<"$named" | tr ',' '\n' | sed -n '/^\([0-9]\|GPU-\|MIG-\)/!q;p' | grep -c . || true)"
        if ((named < there)); then there="$named"; fi
    fi
    printf '%s\n' "$there"
}

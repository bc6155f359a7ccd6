"""Where each number of a Mixtral lives: one rule table, and sources and sinks that all speak it.

Read in this order: `rules` (ten rules), `plan` (what one shard holds), `hf`, `rank_dirs`, `dist_ckpt` (the three
formats), `convert` (from any source to any sink), `cli` (the command lines). `rules` and `plan` import no torch.
"""

"""Where each number of a Mixtral lives: one rule table, and sources and sinks that all speak it.

Read in this order: `rules` (ten rules), `plan` (what one shard holds), `hf`, `rank_dirs`, `dist_ckpt` (the three
formats), `streaming` (how bytes move), `convert` (from any source to any sink), `cli` (the command lines).

Nothing here needs torch to move a weight; only a cast imports it.
"""

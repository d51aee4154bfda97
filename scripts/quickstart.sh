#!/usr/bin/env bash
# Sets everything up, trains a teacher on 8x8 digits, distils it into a one-step generator, samples from that.
. "$(dirname "$0")/setup_env.sh" ""

cm-train mode=cd tracking=none "$@"
cm-sample ckpt=runs/digits-cd num=64 steps=1 out=samples/digits-cd

cat <<TEXT

The picture: $PWD/samples/digits-cd/grid.png  (64 digits, one network call each)

What to try next (after: source .venv/bin/activate):
  cm-sample ckpt=runs/digits-cd num=64 steps=2 out=samples/two-steps   sharper, two calls
  cm-sample ckpt=runs/digits-edm num=64 out=samples/teacher            the teacher, 79 calls, from the same noise
  cm-train mode=ict                                                    a one-step generator without any teacher
  cm-train --help
TEXT

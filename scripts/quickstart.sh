#!/usr/bin/env bash
# Sets everything up, trains a teacher on 8x8 digits, distils it into a one-step generator, samples from that.
. "$(dirname "$0")/setup_env.sh" ""

cm-train mode=cd tracking=none "$@"
rm -rf samples/quickstart # cm-sample itself never overwrites another checkpoint's images
cm-sample runs/digits-cd num=64 steps=1 out=samples/quickstart

cat <<TEXT

The picture: $PWD/samples/quickstart/grid.png  (64 digits, one network call each)

What to try next (after: source .venv/bin/activate):
  cm-sample runs/digits-cd steps=2     sharper, two calls
  cm-sample runs/digits-edm            the teacher, 79 calls, from the same noise
  cm-train mode=ict                    a one-step generator without any teacher
  cm-train --help
TEXT

#!/usr/bin/env bash
# Runs a command on a GPU host that has torch and Triton but no package index, with SGLang from a bundle
# and this package from the wheel that `make wheel` left in dist/.
#
#   integration/gpu/gpu_host.sh BUNDLE COMMAND...
#
# BUNDLE is a folder with an unpack.sh that, sourced, puts SGLang on PYTHONPATH.
set -euo pipefail
bundle=${1:?usage: gpu_host.sh BUNDLE COMMAND...}
shift
source "$bundle/unpack.sh"
site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" dist/*"_$(uname -m).whl"
export PYTHONPATH=$site:$PYTHONPATH
"$@"

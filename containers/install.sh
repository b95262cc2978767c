#!/bin/sh
# Install one role from the pins: sh containers/install.sh trainer|rollout [option of uv pip install]
#
# Both recipes call it, so Docker's and Apptainer's images have the same packages. VIRTUAL_ENV, or
# UV_SYSTEM_PYTHON=1, says where to. DeepSpeed is a source distribution; none of its kernels is used.
set -eu
role=$1
shift
cd "$(dirname "$0")/.."
DS_BUILD_OPS=0 uv pip install --no-cache --compile-bytecode "$@" -r "requirements/$role-cuda.txt"
if [ "$role" = trainer ]; then
	uv pip install --no-cache --compile-bytecode "$@" -r requirements/trackers.txt
fi
uv pip install --no-cache --no-deps "$@" .

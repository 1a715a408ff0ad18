#!/bin/sh
# Installs SimpleTuner 3.1.6 into an environment of its own (3 GB, some minutes): install.sh FOLDER
# Of its own, because it pulls in some two hundred packages. PYTHON may name a Python 3.11, TORCH_INDEX a further package index for torch.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"usage: install.sh FOLDER"}
[ -e "$folder/.simpletuner-ready" ] && [ "$folder/.simpletuner-ready" -nt "$here/constraints.txt" ] && exit 0

for python in "${PYTHON:-python3.11}" python3.11 python3 python; do
	"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break
	python=
done
[ -n "$python" ] || {
	echo "SimpleTuner 3.1.6 needs Python 3.11 here, and none was found; name one with PYTHON=/path/to/python3.11" >&2
	exit 1
}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
install() {
	"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
}
echo "Installing SimpleTuner into $folder (once; some minutes) ..."
install torch
# Without their dependencies: each would fetch another torch.
install --no-deps torchvision torchaudio torchcodec torchao simpletuner==3.1.6
install simpletuner==3.1.6
# torchaudio's libraries need CUDA's. It takes an absent file for "no extension", but fails on one that cannot be loaded.
"$folder/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' &&
	rm -f "$folder"/lib/python3.11/site-packages/torchaudio/lib/*.so
touch "$folder/.simpletuner-ready"

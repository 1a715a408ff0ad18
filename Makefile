# One command set for people and for CI. Every target makes the environment it needs; a second call finds it ready.
#   make run        a whole deployment on this machine         make test      the tests
#   make check      ruff and mypy                              make contract  the wire suite (COMFYUI_URL=... for a real ComfyUI)
#   make bench      ratios against a raw client                make docs      the generated tables
#   make up         the same in containers on a GPU host       make images   the container images
#   make fuzz       requests made from the OpenAPI document
#   make lock       newest versions into constraints.txt       make clean     everything made here but the state folder
# PYTHON=python3.12 chooses the interpreter, TORCH_INDEX=URL a further index to take torch from (its CPU wheels are small).

find_python = for name in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell $(find_python))
endif

VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: run images docker-pin images-check up chaos test test-simpletuner fuzz check bench contract docs lock clean
.DEFAULT_GOAL := run

run: $(VENV)/.local-ready
	@exec $(BIN)/python -m local.up

# Side by side, a file at a time: most of a test is waiting for real servers.
TEST_PROCESSES ?= 3
test: $(VENV)/.dev-ready
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile

check: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.local-ready
	$(BIN)/python -m bench

contract: $(VENV)/.dev-ready
	$(BIN)/pytest tests/contract

# The training journey with the real SimpleTuner, in an environment of its own (3 GB, some minutes); not part of `make test`.
SIMPLETUNER_VENV ?= build/simpletuner-venv
test-simpletuner: $(VENV)/.dev-ready
	$(if $(SIMPLETUNER_PYTHON),,tests/simpletuner/install.sh $(SIMPLETUNER_VENV))
	SIMPLETUNER_PYTHON=$(or $(SIMPLETUNER_PYTHON),$(abspath $(SIMPLETUNER_VENV))/bin/python) $(BIN)/pytest tests/simpletuner

# A storm: processes are killed, paused and restarted under 1,000 jobs; ends with 1 when a promise was broken.
chaos: $(VENV)/.local-ready
	$(BIN)/python -m bench.chaos --jobs 1000 --seed 1

# The images, with the versions of docker/versions.env, a list of what is in each (SBOM) and how it was built. Needs Docker with buildx.
# SPDX lists lie in the registry beside each image: docker buildx imagetools inspect IMAGE --format '{{ json .SBOM }}'
images:
	set -a && . docker/versions.env && docker buildx bake -f docker/bake.hcl $(TARGETS)

# Writes the digests that the registry has today for the images of others into docker/versions.env.
docker-pin:
	@for line in $$(grep -E '^[A-Z]+_IMAGE=' docker/versions.env); do \
		image=$${line#*=}; image=$${image%@*}; \
		digest=$$(docker buildx imagetools inspect "$$image" --format '{{ .Manifest.Digest }}') || exit 1; \
		sed -i.old "s|^$${line%%=*}=.*|$${line%%=*}=$$image@$$digest|" docker/versions.env && rm docker/versions.env.old; \
	done; cat docker/versions.env

# Lints the container and cluster files; also needs what `docker compose` and `kubectl` are at hand, and says what it left out.
images-check: $(VENV)/.dev-ready
	@$(PIP_INSTALL) -c constraints.txt -e '.[local,dev,images]'
	$(BIN)/pytest tests/test_docker.py tests/test_k8s.py

# On a GPU host: everything in containers, on http://127.0.0.1:8000. ARGS="--profile train" adds the trainer.
up:
	docker compose --env-file docker/versions.env $(ARGS) up --detach --build

# Thousands of requests made from the OpenAPI document, against a deployment of its own (5 minutes). FUZZ_SEED for others.
FUZZ_SEED ?= 1
fuzz: $(VENV)/.dev-ready
	$(BIN)/python -m tests.fuzz --seed $(FUZZ_SEED) --at-least 5000

docs: $(VENV)/.local-ready
	$(BIN)/python docs/generate.py

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another with PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Two stamps: running needs no test tools. The extra `dev` comes on top of `local`.
$(VENV)/.local-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what make run needs (once) ..."
	@$(PIP_INSTALL) -c constraints.txt -e '.[local]'
	@touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what the tests need (once) ..."
	@$(PIP_INSTALL) -c constraints.txt -e '.[local,dev]'
	@touch $@ $(VENV)/.local-ready

# A fresh environment, so that nothing installed by hand slips in. Left out: pip itself, torch's build suffix (+cpu), and the
# CUDA packages that one platform's torch brings and pins by itself. torch moves only by hand: a seed's bytes are its.
TORCH_VERSION ?= 2.13.0
lock: LOCK_VENV := build/lock-venv
lock:
	rm -rf $(LOCK_VENV)
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==$(TORCH_VERSION)' -e '.[local,rented,dev]'
	$(LOCK_VENV)/bin/python -m pip freeze --all --exclude-editable --disable-pip-version-check \
		| sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -Ev '^(pip|wheel|triton|nvidia-[^=]*|cuda-[^=]*)==' | LC_ALL=C sort -f > constraints.txt.new
	@! grep -n '@' constraints.txt.new || { echo "a package came from a URL: not written" >&2; exit 1; }
	mv constraints.txt.new constraints.txt
	rm -rf $(LOCK_VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

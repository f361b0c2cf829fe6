PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo demo-road demo-real test test-all test-adapters check bench docs install clean

install: $(VENV)/.installed

# torch first, at the version CI uses; the rest is pinned by constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" "$$(grep '^numpy==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/turnwise demo

demo-road: install
	$(BIN)/turnwise demo --road

demo-real: install
	$(BIN)/turnwise demo --real

# Nothing that tests write must outlive a power cut: memory is faster, where there are 4 GB of it
# in which programs may run.
SCRATCH = $(or $(TMPDIR),$(shell grep -q ' /dev/shm .*noexec' /proc/mounts 2>/dev/null || \
	df --output=avail /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 4e6 {print "/dev/shm"}'),/tmp)

# two at a time, a file each, in conftest's order; torch must not take both cores for either
test: install
	TMPDIR=$(SCRATCH) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: install
	TMPDIR=$(SCRATCH) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Packages that bring much of their own, or an older openai than the judges': on top of the others,
# in a place of their own.
ADAPTERS = $(VENV)-adapters/bin/python
SITE = -c "import site; print(site.getsitepackages()[0])"
test-adapters: install
	test -x $(ADAPTERS) || $(PYTHON) -m venv $(VENV)-adapters
	$(BIN)/python $(SITE) > $$($(ADAPTERS) $(SITE))/installed.pth
	$(ADAPTERS) -m pip install --quiet --disable-pip-version-check "textworld>=1.7,<1.8" "openenv-core>=0.3,<0.4" "verifiers>=0.4,<0.5" uv
	cp $$($(BIN)/python $(SITE))/__editable__* $$($(ADAPTERS) $(SITE))
	OMP_NUM_THREADS=1 $(ADAPTERS) -m pytest tests/test_adapters.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .mypy_path && ln -sfn .. .mypy_path/turnwise  # the root is the package, whatever its folder is called
	MYPYPATH=.mypy_path $(BIN)/mypy -p turnwise
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

# beside TRL's own trainer, which is installed in a folder of its own
bench: install
	test -d .bench/trl || $(BIN)/python -m pip install --quiet --no-deps --target .bench trl==1.16.0
	$(BIN)/python benchmarks/speed.py A-nano A-small --pairs 3 --trl .bench

clean:
	rm -rf $(VENV) .bench .docs_path site .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info

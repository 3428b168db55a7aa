# Two targets matter to a newcomer: `make quickstart` and `make test`. Both work on a fresh machine with Python 3.11 to 3.13 and make.
PYTHON ?= python3
ONNXRUNTIME ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test check install triton lint types imports wheel docs clean

quickstart: install triton  ## images to edge students and a report, on the shipped images; FRESH=1 starts again
	$(BIN)/distill quickstart --config recipes/quickstart.yaml $(if $(FRESH),--fresh)

test: install triton $(VENV)/.checks  ## all tests, those with the real Triton and Ray included
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile tests/unit
	$(BIN)/python -m pytest tests/integration

check: lint types imports test  ## what CI runs, but for the wheel

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(ONNXRUNTIME),timm,dev]'
	touch $@

$(VENV)/.checks: $(STAMP)  # what the tests need beside, and nobody else
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[checks]'
	touch $@

triton: install  ## the real Triton server, in .triton; says so where it cannot run
	$(BIN)/distill install-triton

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

wheel: install  ## build the wheel, install it in a fresh environment, import every package
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv --clear build/wheel-check
	build/wheel-check/bin/python -m pip install --quiet -c constraints.txt "$$(ls -t dist/*.whl | head -n 1)[cpu]"
	cd build && wheel-check/bin/python -c "import distill, teacher_trainer, teacher_server, student_trainer, export; \
	import pkgutil, importlib; \
	[importlib.import_module(m.name) for p in (distill, teacher_trainer, teacher_server, student_trainer, export) \
	 for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.') if 'triton_backends' not in m.name and 'timm' not in m.name]; print('every module of the wheel imports')"
	build/wheel-check/bin/distill --help > /dev/null

docs: install  ## the generated part of the documentation
	$(BIN)/python -m distill.cli.fields > docs/run_file.md

clean:
	rm -rf $(VENV) .triton build dist

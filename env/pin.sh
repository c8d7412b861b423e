#!/usr/bin/env bash
# Pin what is named by a tag to what the tag means today: actions in .github/workflows to commits, the base image to its digest. Needs a network.
# Only what was truly looked up is written; run it again to move on. pin.sh
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0
files=(.github/workflows/*.yml .github/actions/*/action.yml)

pin_actions() {
  local name tag commit
  while read -r name tag; do
    # an annotated tag's commit is under ^{}
    commit=$(git ls-remote "https://github.com/$(cut -d/ -f1,2 <<<"$name")" "refs/tags/$tag" "refs/tags/$tag^{}" 2>/dev/null | tail -n 1 | cut -f1) || commit=
    if [[ "$commit" =~ ^[0-9a-f]{40}$ ]]; then
      sed -i -E "s|(uses: $name)@($tag\|[0-9a-f]{40} # $tag)\$|\1@$commit # $tag|" "${files[@]}"
      echo "$name $tag: $commit"
    else
      echo "$name $tag: could not be looked up; left as it is" >&2
      failed=1
    fi
  done < <(sed -nE 's/.*uses: ([a-z-]+\/[a-z-]+)@(v[0-9.]+|[0-9a-f]{40} # (v[0-9.]+))$/\1 \2/p' "${files[@]}" | sed -E 's/ [0-9a-f]{40} # / /' | sort -u)
}

pin_base() {
  local base digest
  base=$(sed -nE 's/^ARG BASE_IMAGE=([^@]+)(@.*)?$/\1/p' docker/Dockerfile | head -n 1)
  digest=$(docker buildx imagetools inspect "$base" --format '{{.Manifest.Digest}}' 2>/dev/null) || digest=
  if [[ "$digest" =~ ^sha256:[0-9a-f]{64}$ ]]; then
    sed -i -E "s|$base(@sha256:[0-9a-f]{64})?|$base@$digest|" compose.yaml
    sed -i -E "s|^(ARG BASE_IMAGE=$base)(@.*)?\$|\1@$digest|" docker/Dockerfile
    echo "$base: $digest"
  else
    echo "$base: could not be looked up; left as it is" >&2
    failed=1
  fi
}

pin_actions
pin_base
exit $failed

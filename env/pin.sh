#!/usr/bin/env bash
# Pin actions in .github to the commits of their tags, and the base image to its digest. Needs a network.
# Entries that cannot be looked up are left unchanged. Run it again to update the pins.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0
files=(.github/workflows/*.yml .github/actions/*/action.yml)

pin_actions() {
  local name tag commit
  while read -r name tag; do
    # the commit of an annotated tag is listed as ^{}
    commit=$(git ls-remote "https://github.com/$(cut -d/ -f1,2 <<<"$name")" "refs/tags/$tag" "refs/tags/$tag^{}" 2>/dev/null | tail -n 1 | cut -f1) || commit=
    if [[ "$commit" =~ ^[0-9a-f]{40}$ ]]; then
      sed -i -E "s|(uses: $name)@($tag\|[0-9a-f]{40} # $tag)\$|\1@$commit # $tag|" "${files[@]}"
      echo "$name $tag: $commit"
    else
      echo "$name $tag: could not be looked up; unchanged" >&2
      failed=1
    fi
  done < <(sed -nE 's/.*uses: ([a-z-]+(\/[a-z-]+)+)@(v[0-9.]+|[0-9a-f]{40} # (v[0-9.]+))$/\1 \3/p' "${files[@]}" | sed -E 's/ [0-9a-f]{40} # / /' | sort -u)
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
    echo "$base: could not be looked up; unchanged" >&2
    failed=1
  fi
}

pin_actions
pin_base
exit $failed

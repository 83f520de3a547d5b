#!/usr/bin/env bash
# A study on machines without a scheduler. This package, the images and the results folder (a shared file system) are on
# all of them.
#
#   by_hand.sh head                        on the first machine
#   by_hand.sh worker HEAD_IP              on each of the others
#   by_hand.sh study CONFIG [OPTION...]    on the first: mebm sweep, or mebm resume where the study has begun
#   by_hand.sh stop                        on each: ends every Ray process of yours there
#
# Who reaches Ray's ports and has the token can run anything as you. `head` makes the token, in ~/.ray/auth_token; where
# the home folder is not shared, copy that file to the other machines (mode 600) before `worker`.
#
# Read from the environment: RESULTS (folder for study folders, `results`), STUDY_NAME (the study's `name`, if not the
# config's), HEAD_IP (of `head`, where the machine has several addresses), PORT (6379), CPUS and GPUS of this machine
# (all).

set -euo pipefail

export RAY_AUTH_MODE=token
port=${PORT:-6379}
here=()
[ -z "${CPUS:-}" ] || here+=(--num-cpus="$CPUS")
[ -z "${GPUS:-}" ] || here+=(--num-gpus="$GPUS")

case ${1:-} in
head)
    ray get-auth-token --generate >/dev/null
    ip=${HEAD_IP:-$(hostname -I | awk '{ print $1 }')}
    ray start --head --node-ip-address="$ip" --port="$port" --include-dashboard=false --disable-usage-stats \
        ${here[@]+"${here[@]}"}
    echo "on each of the others: by_hand.sh worker $ip"
    ;;
worker)
    ray start --address="${2:?"usage: by_hand.sh worker HEAD_IP"}:$port" --disable-usage-stats ${here[@]+"${here[@]}"}
    ;;
study)
    config=${2:?"usage: by_hand.sh study CONFIG [options of mebm sweep]"}
    shift 2
    results=${RESULTS:-results}
    study=$results/${STUDY_NAME:-$(basename "$config" .yaml)}
    if [ -f "$study/study.yaml" ]; then
        exec mebm resume "$study" --address auto
    fi
    exec mebm sweep "$config" --results "$results" --address auto "$@"
    ;;
stop)
    ray stop
    ;;
*)
    echo "usage: by_hand.sh head | worker HEAD_IP | study CONFIG [OPTION...] | stop" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# The evidence, made again; hours on two cores:   bash notebooks/bench/again.sh DIR [PART ...]
# A run that was killed goes on where it was. SHARDS: how many processes (2); REPORT=only: of what there is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$1 shards=${SHARDS:-2} emilie=${EMILIE:-emilie} only=${REPORT:-}
shift
parts=${*:-tune twins imie drift nothing hundred undo undo-later night-here less}
gates="emilie emilie:masks=false emilie:gate=guidance emilie:gate=eq8"
given="diffedit:mask=given"
fair="$given:guidance=1.0 $given"

make() { # PART KIND SCENES [OPTION ...]
    part=$1
    [ -d "$dir/$part" ] || $emilie bench make "$dir/$part" --kind "$2" --scenes "${@:3}"
}

run() { # SEEDS METHOD ...
    [ "$only" = only ] && return
    local seeds=$1 methods all=()
    shift
    methods=$(tr ' ' , <<<"$*")
    for i in $(seq "$shards"); do
        $emilie bench run "$dir/$part" --out "$dir/$part-run" --seeds "$seeds" --methods "$methods" --shard "$i/$shards" &
        all+=($!)
    done
    for process in "${all[@]}"; do wait "$process"; done
}

report() { # [FIGURE ...]
    $emilie bench report "$dir/$part-run" --out "$dir/$part-report" --grids 2
    sed "s/](\([a-z]*\)\.svg)/]($part-\1.svg)/" "$dir/$part-report/report.md" >"$here/$part.md"
    cp "$dir/$part-report/metrics.csv" "$here/$part.csv"
    for figure in "$@"; do cp "$dir/$part-report/$figure.svg" "$here/$part-$figure.svg"; done
}

for part in $parts; do
    case $part in
    tune) # one rule for all, on scenes that nothing else uses
        $emilie bench tune "$dir/tune" --methods "emilie,ip2p,bld,$given" --setting text_scale=0.75,1,1.25,1.5 \
            --setting image_scale=0.75,1,1.25,1.5 --setting guidance=1,2,3,5 --setting steps=12,25,50
        cp "$dir/tune/tune.json" "$here" ;;
    twins)
        make twins twins 200
        run 0 $gates bld $fair
        report ;;
    imie)
        make imie imie 40
        run 0 $gates ip2p concat bld $fair diffedit pnp:inversion_steps=50
        run 0,1,2 $gates ip2p bld $fair
        report turns drift ;;
    drift)
        make drift drift 40
        run 0,1,2,3,4 emilie ip2p
        report turns drift ;;
    nothing)
        make nothing nothing 20
        run 0 emilie ip2p untouched vae paste lowpass
        report turns drift ;;
    hundred)
        make hundred nothing 5 --turns 100
        run 0 emilie ip2p untouched vae paste lowpass
        report turns drift ;;
    undo)
        make undo undo 40
        run 0,1,2 emilie ip2p
        report turns drift ;;
    undo-later) # in words, after up to three others
        make undo-later undo-later 20
        run 0 emilie emilie:iterate=image ip2p concat paste lowpass
        report turns drift ;;
    night-here)
        make night-here night-here 200
        run 0 $gates bld $fair
        report ;;
    less) # the same edit with less work
        make less imie 24 --turns 1
        all=()
        for n in 100 50 25 12 6; do all+=("emilie:steps=$n"); done
        for n in 25 12 6; do all+=("emilie:sampler=dpmpp_2m:steps=$n" "emilie:sampler=dpmpp_2m_sde:steps=$n"); done
        for way in sigma_high=5.0 sigma_low=0.3:sigma_high=5.0 reuse=2 reuse=3 reuse=5 reuse_guidance=0.5 reuse_guidance=0.25; do
            all+=("emilie:steps=50:$way")
        done
        run 0 "${all[@]}"
        report ;;
    *) echo "no part $part" >&2; exit 2 ;;
    esac
done

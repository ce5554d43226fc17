#!/usr/bin/env bash
# Make the folder shipped/ anew: the router, an expert a domain, a proxied one with its small model, and the index over the
# project's own documents.
#
#   COLLEGIUM_DATA=... training/ship.sh [HOME]
#
# An expert that its gate would refuse is shipped all the same, and its card says so (--force).
# HOME keeps the jobs, so that a run that was stopped goes on where it was. Without a GPU it takes hours.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${COLLEGIUM_DATA:?names the folder of the data; docs/examples.md says its form}
export COLLEGIUM_HOME=${1:-build/ship}
collegium=${COLLEGIUM:-.venv/bin/collegium}

train() { # NAME DESCRIPTION LICENCE LIMIT OPTIONS TASK...
    local name=$1 description=$2 licence=$3 limit=$4 options=$5
    shift 5
    local files=()
    for task in "$@"; do
        files+=(--examples "$data/experts/$name/$task.train.jsonl.gz" --test "$data/experts/$name/$task.test.jsonl.gz")
    done
    for option in rank=4 learning_rate=4e-3 epochs=1.0 $options; do files+=(--option "$option"); done
    $collegium train "$name" "${files[@]}" --general "$data/experts/general/self_instruct.train.jsonl.gz" \
        --description "$description" --licence "$licence" --limit "$limit" --force
}

# A home is seeded from shipped/ where that exists; a first release made from nothing is what is wanted here.
rm -rf shipped
$collegium router fit --train "$data/router/domains.train.jsonl.gz" --dev "$data/router/domains.dev.jsonl.gz"
train finance "Banking and money: names what a bank's customer wants, reads financial reports, explains terms." \
    "CC BY 4.0 (BANKING77, TAT-QA)" 4000 "max_length=384" banking77 tatqa
train law "Law: fairness of contract clauses, privacy policies, short legal questions." \
    "CC BY 4.0 (Unfair ToS, LegalBench), MIT (PrivacyQA)" 1000 "max_length=384" unfair_tos privacyqa legalbench
train science "Science at school: physics, biology, chemistry, the Earth." \
    "CC BY-SA 4.0 (ARC), Apache-2.0 (OpenBookQA)" 1000 "" arc_easy arc_challenge openbookqa
train code "Programming and the shell: turns a task into a bash command, explains code." \
    "MIT (NL2Bash)" 2000 "" nl2bash
train health "Health: questions of patients, medical exams, what a study found." \
    "MIT (PubMedQA), Apache-2.0 (MedMCQA), CC BY 4.0 (MedQuAD)" 350 "" pubmedqa medmcqa medquad

# The small model of proxied experts. What it prints last is the setting small_model's default.
texts=()
for task in code/nl2bash finance/banking77 finance/tatqa general/boolq general/self_instruct health/medquad health/pubmedqa \
    law/legalbench math/gsm8k science/arc_challenge science/arc_easy; do
    texts+=(--text "$data/experts/$task.train.jsonl.gz")
done
small=$($collegium shrink --layers 12 --steps 500 --limit 2000 "${texts[@]}" | tail -n 1)
medquad=$data/experts/health/medquad
$collegium proxy health-proxy --small "$small" --examples "$medquad.train.jsonl.gz" --test "$medquad.test.jsonl.gz" --limit 800 \
    --option rank=16 --description "Questions of patients, answered at length: the base model, steered by a small expert." \
    --licence "CC BY 4.0 (MedQuAD)"

questions=$(mktemp --suffix=.txt)
sed -n 's/^## \(.*?\)$/\1/p' docs/faq.md > "$questions"
$collegium experts add collegium --docs docs --examples "$questions" \
    --description "Collegium, this program: its commands, experts, router, releases, settings and training."
rm "$questions"
$collegium releases export shipped
$collegium experts list

//! What the command reads that others may have written: experiments, `--set`, `--sweep`, seeds, and its own tables.

#[path = "../../../tests/hostile/mutate.rs"]
mod mutate;

use proptest::prelude::*;

use crate::args::{ScoreKind, SeedRange};
use crate::commands::search_ts::log::{Log, Settings};
use crate::commands::sweep::plan::plan;
use crate::commands::sweep::table::Table;
use crate::config::Source;
use crate::experiment::Experiment;
use mutate::{assert_memory_bounded, assert_one_line, config, damaged, damaged_text, scratch};

fn one_line<T>(result: anyhow::Result<T>) {
    if let Err(error) = result {
        assert_one_line(&crate::exit::Failure::Usage(error).to_string());
    }
    assert_memory_bounded();
}

fn preset(name: &str) -> Vec<u8> {
    Source::find(name).unwrap().text().as_bytes().to_vec()
}

fn settings() -> Settings {
    Settings {
        model: "0".into(),
        steps: 40,
        rho: 7.0,
        score: ScoreKind::Fid,
        judge: None,
        samples: 16,
        data: "digits".into(),
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn experiments(bytes in damaged(["digits-ct", "digits-ect", "digits-pd", "cifar10-cd"].map(preset).to_vec())) {
        let folder = scratch();
        let path = folder.path().join("x.toml");
        std::fs::write(&path, &bytes).unwrap();
        one_line(Source::file(path).and_then(|source| Experiment::read(&source, &[])));
    }

    #[test]
    fn changes(set in damaged_text(&[
        "train.lr=1e-4",
        "train.metric={kind='pseudo_huber', c=0.01}",
        "network.channel_mult=[1, 2]",
        "train.pairs.num_scales.s0=2",
        "run.log_every=1",
    ])) {
        one_line(Experiment::read(&Source::find("digits-ct").unwrap(), &[set]));
    }

    #[test]
    fn sweeps(one in damaged_text(&["train.lr=1e-3,5e-4", "train.metric=l2,{kind='huber', c=0.01}"]), two in damaged_text(&[
        "network.channel_mult=[[1, 2], [2, 2]]", "train.lr='a,b',\"c\\\"d\"",
    ])) {
        one_line(plan(&[one, two]));
    }

    #[test]
    fn seeds(text in damaged_text(&["0-63", "1,5,9-12", "72057594037927935"])) {
        if let Err(error) = text.parse::<SeedRange>() {
            assert_one_line(&error);
        }
        assert_memory_bounded();
    }

    #[test]
    fn tables_of_sweeps_and_logs_of_searches(
        table in damaged_text(&[
            r#"{"keys":["train.lr"],"runs":[{"name":"lr=1e-3","values":{"train.lr":"1e-3"},"status":"waiting","folder":"a"}]}"#,
        ]),
        evaluation in damaged_text(&["{\"ts\":[0,22,39],\"score\":0.5}\n"]),
    ) {
        let folder = scratch();
        std::fs::write(folder.path().join("sweep.json"), table).unwrap();
        one_line(Table::plan_in(folder.path()));
        let path = folder.path().join("log.jsonl");
        let head = serde_json::to_string(&settings()).unwrap();
        std::fs::write(&path, format!("{head}\n{evaluation}\n")).unwrap();
        one_line(Log::open(&path, &settings()));
    }
}

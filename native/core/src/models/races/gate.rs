//! The gate: a close against those who enter and leave.

use super::{explore, join, spawn};
use crate::gate::Gate;
use crate::models::FOREVER;
use crate::state::Shadow;
use std::sync::Arc;

/// Whoever got in before the close is waited for, and what they did inside is seen; nobody gets in after it.
#[test]
fn close_against_enter() {
    explore(|| {
        let inside = Arc::new((Gate::new(), Shadow::default()));
        let enter = |inside: &Arc<(Gate, Shadow)>| {
            let inside = inside.clone();
            spawn(move || {
                if let Some(_pass) = inside.0.enter() {
                    inside.1.read();
                }
            })
        };
        let threads = [enter(&inside), enter(&inside)];
        inside.0.close();
        assert_eq!(inside.0.wait(FOREVER), 0);
        // Torn down: whoever were still inside, or came in now, would be seen.
        inside.1.write();
        assert!(inside.0.enter().is_none());
        threads.into_iter().for_each(join);
    });
}

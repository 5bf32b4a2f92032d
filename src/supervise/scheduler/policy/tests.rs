//! The policy against a model of a GIL: whoever is open and wants it has its share of each tick.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Policy, Seen, TICK, Terms, compete};

/// A worker of the model: what part of a processor it would use if it were alone.
#[derive(Clone, Copy)]
struct Model {
    wants: f64,
    terms: Terms,
    starting: bool,
    paused: bool,
}

fn busy(weight: f64) -> Model {
    let terms = Terms { weight, shares_gil: true, ..Terms::default() };
    Model { wants: 1.0, terms, starting: false, paused: false }
}

fn lazy(wants: f64) -> Model {
    Model { wants, ..busy(1.0) }
}

struct World {
    policy: Policy,
    workers: Vec<Model>,
    held: Vec<bool>,
    used: Vec<f64>,
    turns: bool,
    most_at_once: usize,
    chance: u64,
}

impl World {
    fn of(workers: Vec<Model>) -> Self {
        let count = workers.len();
        let (held, used) = (vec![false; count], vec![0.0; count]);
        Self { policy: Policy::default(), workers, held, used, turns: false, most_at_once: 0, chance: 1 }
    }

    fn run(&mut self, seconds: f64) {
        let tick = TICK.as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small positive number"
        )]
        let ticks = (seconds / tick) as usize;
        for _ in 0..ticks {
            let mut had = BTreeMap::new();
            for shares in [true, false] {
                let open: Vec<usize> = (0..self.workers.len())
                    .filter(|&at| {
                        let worker = &self.workers[at];
                        !self.held[at] && !worker.paused && worker.terms.shares_gil == shares
                    })
                    .collect();
                let wanted: f64 = open.iter().map(|&at| self.workers[at].wants).sum();
                let fits = if shares && wanted > 1.0 { 1.0 / wanted } else { 1.0 };
                had.extend(open.into_iter().map(|at| (at, self.workers[at].wants * fits * tick)));
            }
            let gil: f64 =
                had.iter().filter(|(at, _)| self.workers[**at].terms.shares_gil).map(|(_, used)| used).sum();
            let seen: Vec<Seen> = self
                .workers
                .iter()
                .enumerate()
                .map(|(at, worker)| Seen {
                    id: at as u64,
                    terms: worker.terms,
                    used: Duration::from_secs_f64(had.get(&at).copied().unwrap_or(0.0)),
                    waits: self.held[at] && worker.wants > 0.0,
                    paused: worker.paused,
                    starting: worker.starting,
                })
                .collect();
            for (at, used) in had {
                self.used[at] += used;
            }
            let free = self.chance() * tick >= gil;
            let verdict = self.policy.tick(TICK, &seen, free);
            self.turns = verdict.turns;
            for (id, held) in verdict.held {
                self.held[usize::try_from(id).unwrap()] = held;
            }
            let open = (0..self.workers.len()).filter(|&at| !self.held[at] && self.workers[at].wants > 0.5);
            self.most_at_once = self.most_at_once.max(open.count());
        }
    }

    /// From 0 to nearly 1, the same ones each time.
    fn chance(&mut self) -> f64 {
        self.chance =
            self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f64::from(u32::try_from(self.chance >> 33).unwrap_or(0)) / f64::from(1_u32 << 31)
    }

    fn share(&self, at: usize) -> f64 {
        self.used[at] / self.used.iter().sum::<f64>()
    }
}

fn near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 0.1 * expected
}

#[test]
fn busy_ones_have_equal_shares_one_at_a_time() {
    let mut world = World::of(vec![busy(1.0); 25]);
    world.run(1.0);
    (world.used, world.most_at_once) = (vec![0.0; 25], 0);
    world.run(10.0);
    assert!(world.turns);
    assert_eq!(world.most_at_once, 1);
    for at in 0..25 {
        assert!(near(world.share(at), 1.0 / 25.0), "{at}: {}", world.share(at));
    }
    let whole: f64 = world.used.iter().sum();
    assert!(whole > 9.9, "the GIL is never free: {whole}");
}

#[test]
fn shares_are_as_the_weights() {
    let mut world = World::of(vec![busy(1.0), busy(2.0), busy(5.0)]);
    world.run(10.0);
    for (at, part) in [(0, 1.0 / 8.0), (1, 2.0 / 8.0), (2, 5.0 / 8.0)] {
        assert!(near(world.share(at), part), "{at}: {}", world.share(at));
    }
}

#[test]
fn one_that_is_busy_alone_is_never_held() {
    let mut world = World::of(vec![busy(1.0), lazy(0.05), lazy(0.0)]);
    world.run(2.0);
    assert!(!world.turns);
    assert_eq!(world.held, [false; 3]);
}

#[test]
fn one_that_wants_little_is_never_held() {
    let mut world = World::of(vec![busy(1.0), busy(1.0), lazy(0.05)]);
    for _ in 0..200 {
        world.run(0.005);
        assert!(!world.held[2]);
    }
    assert!(world.turns);
}

#[test]
fn those_that_leave_the_gil_free_are_let_in_together() {
    let mut world = World::of(vec![lazy(0.3); 3]);
    world.run(10.0);
    let whole: f64 = world.used.iter().sum();
    assert!(whole > 0.9 * 9.0, "{whole} of 9 seconds");
}

#[test]
fn who_was_away_has_no_claim_to_what_it_did_not_want() {
    let mut world = World::of(vec![busy(1.0), busy(1.0), lazy(0.0)]);
    world.run(10.0);
    world.workers[2].wants = 1.0;
    world.run(1.0);
    world.used = vec![0.0; 3];
    world.run(5.0);
    for at in 0..3 {
        assert!(near(world.share(at), 1.0 / 3.0), "{at}: {}", world.share(at));
    }
}

#[test]
fn a_quota_is_kept_and_the_rest_is_shared() {
    let mut workers = vec![busy(1.0); 3];
    workers[0].terms.quota = Some(0.1);
    let mut world = World::of(workers);
    world.run(10.0);
    assert!(near(world.used[0], 1.0), "{}", world.used[0]);
    assert!(near(world.used[1], 4.5) && near(world.used[2], 4.5), "{:?}", world.used);
}

#[test]
fn a_quota_is_kept_of_a_worker_with_its_own_gil() {
    let mut worker = busy(1.0);
    (worker.terms.quota, worker.terms.shares_gil) = (Some(0.3), false);
    let mut world = World::of(vec![worker]);
    world.run(10.0);
    assert!(near(world.used[0], 3.0), "{}", world.used[0]);
    assert!(!world.turns);
}

#[test]
fn what_was_abandoned_gets_the_leftovers() {
    let mut workers = vec![busy(1.0); 3];
    workers[0].terms.leftovers = true;
    let mut world = World::of(workers);
    world.run(1.0);
    world.used = vec![0.0; 3];
    world.run(5.0);
    assert!(world.used[0] < 0.05, "{:?}", world.used);
    world.workers[1].paused = true;
    world.workers[2].wants = 0.0;
    world.run(2.0);
    assert!(world.used[0] > 1.0, "{:?}", world.used);
}

#[test]
fn those_that_are_starting_come_first_but_not_for_ever() {
    let mut world = World::of(vec![busy(1.0), busy(1.0), Model { starting: true, ..lazy(0.1) }]);
    world.run(1.0);
    assert!(world.used[0] + world.used[1] < 0.4, "{:?}", world.used);
    assert!(world.used[0] + world.used[1] > 0.1, "{:?}", world.used);
    world.used = vec![0.0; 3];
    world.run(1.0);
    assert!(world.used[0] + world.used[1] > 0.8, "{:?}", world.used);
}

#[test]
fn a_paused_one_takes_no_turn() {
    let mut workers = vec![busy(1.0); 3];
    workers[1].paused = true;
    let mut world = World::of(workers);
    world.run(4.0);
    assert!(near(world.share(0), 0.5) && near(world.share(2), 0.5), "{:?}", world.used);
}

#[test]
fn who_stands_in_nobodys_way_does_not_compete() {
    assert_eq!(compete(&[]), [false; 0]);
    assert_eq!(compete(&[(1.0, 1.0)]), [true]);
    assert_eq!(compete(&[(0.04, 1.0); 25]), [true; 25]);
    assert_eq!(compete(&[(0.009, 1.0); 200]), [false; 200]);
    assert_eq!(compete(&[(0.9, 1.0), (0.05, 1.0), (0.9, 1.0)]), [true, false, true]);
}

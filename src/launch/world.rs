//! Who am I: the rank and the size of the world, from the variables that launchers set. The only place that reads them.

use anyhow::Result;

use super::variable;
use crate::Refusal;

/// This process's place among the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    pub rank: usize,
    pub world_size: usize,
    /// The place on this machine; today always equal to `rank`.
    pub local_rank: usize,
    pub local_world_size: usize,
    /// The machine's place; today always 0.
    pub node_rank: usize,
    /// Where ranks of several machines would meet.
    pub master: Option<(String, u16)>,
    pub starter: Starter,
    /// The same for all ranks of this start and for no other job of this user on this machine.
    pub job: String,
}

/// Who started this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// Nobody in particular: a world of one.
    Nobody,
    /// `dblaunch --nproc`.
    Dblaunch,
    Torchrun,
    OpenMpi,
    /// MPICH, Intel MPI and others with a PMI process manager.
    Pmi,
    Slurm,
}

impl World {
    /// A world of one that nobody launched.
    pub fn solo() -> World {
        World {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            node_rank: 0,
            master: None,
            starter: Starter::Nobody,
            job: String::new(),
        }
    }

    /// The place that a launcher gave this process; `None` if it was started by hand (or by srun or mpirun as the only
    /// task, which is as good). A [`Refusal`] if the variables contradict each other or name several machines.
    pub fn from_environment() -> Result<Option<World>> {
        World::from_variables(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<World>> {
        let vars = Variables { get };
        for read in [Variables::torchrun, Variables::open_mpi, Variables::pmi, Variables::slurm] {
            if let Some(world) = read(&vars)? {
                world.check()?;
                // Nobody needs a launcher for one task; `--nproc` may then still start ranks.
                let lone =
                    world.world_size == 1 && matches!(world.starter, Starter::Slurm | Starter::Pmi | Starter::OpenMpi);
                return Ok((!lone).then_some(world));
            }
        }
        Ok(None)
    }

    fn check(&self) -> Result<()> {
        let World { rank, world_size, local_rank, local_world_size, starter, .. } = self;
        if local_world_size < world_size {
            return Err(Refusal::error(format!(
                "the environment ({starter:?}'s variables) names {world_size} ranks, of which {local_world_size} are on \
                 this machine, but runs over several machines are not there yet: start all ranks on one machine \
                 (for example `dblaunch --nproc {local_world_size} …`)"
            )));
        }
        if rank >= world_size || local_rank >= local_world_size || local_world_size != world_size {
            return Err(Refusal::error(format!(
                "the environment ({starter:?}'s variables) names rank {rank} of {world_size}, on this machine \
                 {local_rank} of {local_world_size}, which cannot be: unset the variables left over from another launcher, \
                 or start all ranks with one"
            )));
        }
        Ok(())
    }
}

struct Variables<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.get)(name)
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let number = text.trim().parse().map_err(|_| {
            Refusal::error(format!(
                "the environment variable {name} is \"{text}\", not a number: unset it, or set it right"
            ))
        });
        number.map(Some)
    }

    /// Several variables joined; those that are absent are left out.
    fn job(&self, starter: Starter, names: &[&str]) -> String {
        let values: Vec<_> = names.iter().filter_map(|name| Some(format!("{name}={}", self.text(name)?))).collect();
        // The parent tells jobs apart where no name does: all local ranks of one start have the same.
        let parent = if values.is_empty() { std::os::unix::process::parent_id() } else { 0 };
        format!("{starter:?} {parent} {}", values.join(" "))
    }

    fn master(&self) -> Result<Option<(String, u16)>> {
        let Some(address) = self.text("MASTER_ADDR") else { return Ok(None) };
        Ok(self.number("MASTER_PORT")?.and_then(|port| u16::try_from(port).ok()).map(|port| (address, port)))
    }

    /// Our own launcher's and torchrun's.
    fn torchrun(&self) -> Result<Option<World>> {
        let (Some(rank), Some(world_size)) = (self.number("RANK")?, self.number("WORLD_SIZE")?) else {
            return Ok(None);
        };
        let (local_rank, local_size) = (self.number("LOCAL_RANK")?, self.number("LOCAL_WORLD_SIZE")?);
        // Some clusters set RANK=0 WORLD_SIZE=1 for a machine, which is no rank.
        if local_rank.is_none() && world_size == 1 {
            return Ok(None);
        }
        let starter = if self.text(variable::RANK).is_some() { Starter::Dblaunch } else { Starter::Torchrun };
        let names = ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"];
        Ok(Some(World {
            rank,
            world_size,
            local_rank: local_rank.unwrap_or(rank),
            local_world_size: local_size.unwrap_or(world_size),
            node_rank: self.number("GROUP_RANK")?.unwrap_or(0),
            master: self.master()?,
            starter,
            job: self.job(starter, &names),
        }))
    }

    fn open_mpi(&self) -> Result<Option<World>> {
        let (rank, size) = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
        let local = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE");
        let names = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"];
        self.four(Starter::OpenMpi, [rank, size, local.0, local.1], &names)
    }

    fn pmi(&self) -> Result<Option<World>> {
        let names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
        self.four(Starter::Pmi, names, &["PMI_JOBID"])
    }

    /// Only in a step of srun: a batch script has some of the variables, too, and is no rank.
    fn slurm(&self) -> Result<Option<World>> {
        // Numbers from 2^32 - 16 on stand for the batch script, an interactive shell and the like.
        let step = self.text("SLURM_STEP_ID").and_then(|step| step.parse::<u32>().ok());
        if step.is_none_or(|step| step >= u32::MAX - 15) {
            return Ok(None);
        }
        let size = if self.text("SLURM_STEP_NUM_TASKS").is_some() { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
        let names = ["SLURM_PROCID", size, "SLURM_LOCALID", ""];
        let Some(world) = self.four(Starter::Slurm, names, &["SLURM_JOB_ID", "SLURM_STEP_ID"])? else {
            return Ok(None);
        };
        let machines = self.number("SLURM_STEP_NUM_NODES")?.or(self.number("SLURM_NNODES")?).unwrap_or(1);
        // With several machines it is refused anyhow; how many ranks each has is then of no matter.
        let local_world_size = world.world_size.div_ceil(machines.max(1));
        let node_rank = self.number("SLURM_NODEID")?.unwrap_or(0);
        Ok(Some(World { local_world_size, node_rank, ..world }))
    }

    /// Launchers whose variables are rank, size, local rank, local size; the last may be missing.
    fn four(&self, starter: Starter, names: [&str; 4], job: &[&str]) -> Result<Option<World>> {
        let (Some(rank), Some(world_size)) = (self.number(names[0])?, self.number(names[1])?) else {
            return Ok(None);
        };
        Ok(Some(World {
            rank,
            world_size,
            local_rank: self.number(names[2])?.unwrap_or(rank),
            local_world_size: self.number(names[3])?.unwrap_or(world_size),
            node_rank: 0,
            master: self.master()?,
            starter,
            job: self.job(starter, job),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &[(&str, &str)]) -> Result<Option<World>> {
        World::from_variables(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    fn place(variables: &[(&str, &str)]) -> Option<(Starter, usize, usize)> {
        world(variables).unwrap().map(|world| (world.starter, world.rank, world.world_size))
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(place(&[]), None);
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")];
        assert_eq!(place(&torchrun), Some((Starter::Torchrun, 1, 2)));
        assert_eq!(place(&[&torchrun[..], &[("DBLAUNCH_RANK", "1")]].concat()), Some((Starter::Dblaunch, 1, 2)));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ];
        assert_eq!(place(&mpi), Some((Starter::OpenMpi, 3, 4)));
        assert_eq!(place(&[("PMI_RANK", "0"), ("PMI_SIZE", "2")]), Some((Starter::Pmi, 0, 2)));
        let srun = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "1"), ("SLURM_STEP_ID", "0")];
        assert_eq!(place(&srun), Some((Starter::Slurm, 1, 2)));
        assert_eq!(place(&[&srun[..], &mpi[..], &torchrun[..]].concat()), Some((Starter::Torchrun, 1, 2)));
    }

    #[test]
    fn what_is_no_rank_is_not_taken_for_one() {
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "0")];
        assert_eq!(place(&batch), None);
        assert_eq!(place(&[&batch[..], &[("SLURM_STEP_ID", "4294967290")]].concat()), None);
        let only_task = [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_STEP_ID", "2")];
        assert_eq!(place(&only_task), None);
        assert_eq!(place(&[("RANK", "0"), ("WORLD_SIZE", "1")]), None);
    }

    #[test]
    fn ranks_of_one_start_share_a_job_and_others_do_not() {
        let job = |rank: &str, port: &str| {
            let variables = [("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)];
            world(&variables).unwrap().unwrap().job
        };
        assert_eq!(job("0", "29500"), job("1", "29500"));
        assert_ne!(job("0", "29500"), job("0", "29501"));
    }

    #[test]
    fn several_machines_and_nonsense_are_refused() {
        let several = [("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")];
        let nonsense = [("RANK", "2"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")];
        let no_number = [("RANK", "one"), ("WORLD_SIZE", "2")];
        let slurm = [
            ("SLURM_PROCID", "1"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NUM_NODES", "2"),
        ];
        for (variables, words) in [
            (&several[..], "several machines"),
            (&nonsense[..], "rank 2 of 2"),
            (&no_number[..], "RANK is \"one\""),
            (&slurm[..], "several machines"),
        ] {
            let error = world(variables).unwrap_err();
            assert!(error.is::<Refusal>() && error.to_string().contains(words), "{error}");
        }
    }
}
